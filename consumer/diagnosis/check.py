"""What one look came to."""

from enum import StrEnum
from typing import NamedTuple

from consumer.errors import links, one_line
from consumer.tls_errors import HandshakeError


class State(StrEnum):
    """Whether a worker can do its work: as it should be, worth knowing, or in the way."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Check(NamedTuple):
    """One look: its name, what it came to, what was found, and what to do unless all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Return a check at which there is nothing to do."""
    return Check(name, State.OK, found)


def warning(name: str, found: str, remedy: str) -> Check:
    """Return a check that found what may be meant, or does no harm yet."""
    return Check(name, State.WARNING, found, remedy)


def problem(name: str, found: str, remedy: str) -> Check:
    """Return a check that found what keeps a worker from its work, or runs from their end."""
    return Check(name, State.PROBLEM, found, remedy)


def unreachable(name: str, error: BaseException, setting: str) -> Check:
    """Return a check of a server to which there was no connection: why, and what to do about that."""
    remedy = next((link.remedy for link in links(error) if isinstance(link, HandshakeError)), "")
    if not remedy and any(words in one_line(error) for words in _WRONG_PASSWORD):
        remedy = f"correct the password in {setting}; a worker reads {setting}_FILE again at each try"
    if not remedy and f"{setting}: " in one_line(error):  # a file that the URL names
        remedy = "correct it; a worker looks again at each try"
    words = one_line(error)
    reason = words.partition(" is not available: ")[2] or words
    return problem(name, f"not reachable: {reason}", remedy or f"start it, or correct {setting}; a worker waits for it")


# PostgreSQL's and RabbitMQ's words for a user or a password that is not right.
_WRONG_PASSWORD = ("password authentication failed", "ACCESS_REFUSED - Login was refused")
