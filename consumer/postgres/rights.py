"""What a worker does with each table, as ``GRANT`` writes it: the rights that its role needs, and no other.

``deploy/postgresql/rights.sql`` grants them, a worker and ``closeout doctor`` look for them, and the tests take them
away one by one. FOR UPDATE asks for UPDATE on some column, which is why the outbox has one.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

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


REMEDY = "run deploy/postgresql/rights.sql as the tables' owner"
_RIGHTS = text(
    """
    SELECT w.place, CASE WHEN w.attribute IS NULL THEN has_table_privilege(c.oid, w.privilege)
                         ELSE has_column_privilege(c.oid, w.attribute, w.privilege) END AS given
      FROM unnest(CAST(:tables AS text[]), CAST(:privileges AS text[]), CAST(:columns AS text[]))
           WITH ORDINALITY AS w (relname, privilege, attribute, place)
      JOIN pg_class c ON c.relname = w.relname
      JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'governance'
     WHERE w.attribute IS NULL OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid
                                             AND a.attname = w.attribute AND NOT a.attisdropped)
    """
)


class Right(NamedTuple):
    """One privilege on a table, or on one column of it where *column* is given."""

    table: str
    privilege: str
    column: str | None = None

    def __str__(self) -> str:
        return self.privilege if self.column is None else f"{self.privilege}({self.column})"


def each_right(rights: Mapping[str, str] = WORKER_RIGHTS) -> list[Right]:
    """Return *rights* one by one: every privilege of every table, and every column that has one of its own."""
    return [
        Right(table, privilege, column or None)
        for table, words in rights.items()
        for privilege, _, columns in (word.rstrip(")").partition("(") for word in words.split())
        for column in columns.split(",")
    ]


async def missing_rights(conn: AsyncConnection) -> list[Right]:
    """Return which of a worker's rights this role has not, of tables and columns that are there."""
    wanted = each_right()
    names = {"tables": "table", "privileges": "privilege", "columns": "column"}
    found = await conn.execute(_RIGHTS, {name: [getattr(right, of) for right in wanted] for name, of in names.items()})
    return sorted(wanted[row.place - 1] for row in found if not row.given)


def spelled_out(rights: Iterable[Right]) -> str:
    """Return *rights* in words, by table."""
    by_table: dict[str, list[str]] = {}
    for right in rights:
        by_table.setdefault(right.table, []).append(str(right))
    return "; ".join(f"{', '.join(words)} on {table}" for table, words in by_table.items())
