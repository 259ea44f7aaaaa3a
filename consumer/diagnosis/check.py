"""The result of one check."""

from enum import StrEnum
from typing import NamedTuple

from consumer.diagnosis.certificate import examine_handshake
from consumer.errors import one_line


class State(StrEnum):
    """The severity of a check: fine, worth knowing, or preventing a worker from working."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Check(NamedTuple):
    """One check: its name, its state, what was found, and what to do."""

    name: str
    state: State
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Return a check with nothing to do."""
    return Check(name, State.OK, found)


def warning(name: str, found: str, remedy: str) -> Check:
    """Return a check whose finding may be intended, or is harmless so far."""
    return Check(name, State.WARNING, found, remedy)


def problem(name: str, found: str, remedy: str) -> Check:
    """Return a check whose finding prevents a worker from working, or runs from being closed out."""
    return Check(name, State.PROBLEM, found, remedy)


async def unreachable(name: str, error: BaseException, setting: str) -> Check:
    """Return a check of an unreachable server: the reason, and what to do."""
    tls = await examine_handshake(error)
    message = one_line(tls or error)
    remedy = tls.remedy if tls else f"start the server, or correct {setting}; a worker waits for it"
    if any(refusal in message for refusal in _WRONG_PASSWORD):
        remedy = f"correct the password in {setting}; a worker reads {setting}_FILE at each attempt"
    elif f"{setting}: " in message:  # a file that the URL names
        remedy = "correct it; a worker reads it at each attempt"
    reason = message.partition(" is not available: ")[2] or message
    return problem(name, f"not reachable: {reason}", remedy)


# PostgreSQL's and RabbitMQ's errors for a wrong user or password.
_WRONG_PASSWORD = ("password authentication failed", "ACCESS_REFUSED - Login was refused")
