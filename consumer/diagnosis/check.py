"""What one look came to."""

from enum import StrEnum
from typing import NamedTuple


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
