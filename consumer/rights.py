"""What a worker does with each table, as ``GRANT`` writes it: the rights that its role needs, and no other.

``deploy/postgresql/rights.sql`` grants them, ``closeout doctor`` looks for them, and the tests take them away one by
one. FOR UPDATE asks for UPDATE on some column, which is why the outbox has one.
"""

from types import MappingProxyType
from typing import NamedTuple

WORKER_RIGHTS = MappingProxyType(
    {
        "run_completions": "SELECT INSERT UPDATE(phase,committed_at,events_published_at)",
        "incidents": "SELECT INSERT",
        "prevention_records": "SELECT INSERT",
        "policies": "SELECT",
        "policy_evaluations": "SELECT INSERT",
        "traces": "SELECT INSERT UPDATE(status,started_at,completed_at,steps)",
        "outbox_events": "SELECT INSERT UPDATE(created_at) DELETE",
        "rollbacks": "SELECT INSERT",
    }
)


class Right(NamedTuple):
    """One privilege on a table, or on one column of it where *column* is given."""

    table: str
    privilege: str
    column: str | None = None

    def __str__(self) -> str:
        return self.privilege if self.column is None else f"{self.privilege}({self.column})"


def each_right(rights: "dict[str, str] | MappingProxyType[str, str]" = WORKER_RIGHTS) -> list[Right]:
    """Return *rights* one by one: every privilege of every table, and every column that has one of its own."""
    return [
        Right(table, privilege, column or None)
        for table, words in rights.items()
        for privilege, _, columns in (word.rstrip(")").partition("(") for word in words.split())
        for column in columns.split(",")
    ]
