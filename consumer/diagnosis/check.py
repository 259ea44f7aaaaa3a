"""The result of one check."""

from enum import StrEnum
from typing import NamedTuple

from consumer.errors import links, one_line
from consumer.tls_errors import HandshakeError


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


def unreachable(name: str, error: BaseException, setting: str) -> Check:
    """Return a check of an unreachable server: the reason, and what to do."""
    remedy = next((link.remedy for link in links(error) if isinstance(link, HandshakeError)), "")
    if not remedy and any(words in one_line(error) for words in _WRONG_PASSWORD):
        remedy = f"correct the password in {setting}; a worker reads {setting}_FILE at each attempt"
    if not remedy and f"{setting}: " in one_line(error):  # a file that the URL names
        remedy = "correct it; a worker reads it at each attempt"
    words = one_line(error)
    reason = words.partition(" is not available: ")[2] or words
    return problem(
        name, f"not reachable: {reason}", remedy or f"start the server, or correct {setting}; a worker waits for it"
    )


# PostgreSQL's and RabbitMQ's errors for a wrong user or password.
_WRONG_PASSWORD = ("password authentication failed", "ACCESS_REFUSED - Login was refused")
