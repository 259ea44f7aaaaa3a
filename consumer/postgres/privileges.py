"""The privileges that a worker's role needs on each table, and no others.

``deploy/postgresql/rights.sql`` grants them, the worker and ``closeout doctor`` check them, and the tests revoke them
one by one. FOR UPDATE needs UPDATE on some column; workers before schema 0009 check that of the outbox's created_at.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

WORKER_PRIVILEGES = MappingProxyType(
    {
        "run_completions": "SELECT INSERT UPDATE(phase,committed_at,events_published_at)",
        "incidents": "SELECT INSERT",
        "prevention_records": "SELECT INSERT",
        "policies": "SELECT",
        "policy_evaluations": "SELECT INSERT",
        "traces": "SELECT INSERT UPDATE(status,started_at,completed_at,steps)",
        "outbox_events": "SELECT INSERT UPDATE(created_at,set_aside_until,set_aside_reason) DELETE",
        "rollbacks": "SELECT INSERT",
    }
)


REMEDY = "run deploy/postgresql/rights.sql as the tables' owner"
_MISSING = text(
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


class Privilege(NamedTuple):
    """One privilege on a table, or on one column of it where *column* is given."""

    table: str
    privilege: str
    column: str | None = None

    def __str__(self) -> str:
        return self.privilege if self.column is None else f"{self.privilege}({self.column})"


def each_privilege(granted: Mapping[str, str] = WORKER_PRIVILEGES) -> list[Privilege]:
    """Return *granted* as single privileges: one per table or, where columns are listed, one per column."""
    return [
        Privilege(table, privilege, column or None)
        for table, grants in granted.items()
        for privilege, _, columns in (grant.rstrip(")").partition("(") for grant in grants.split())
        for column in columns.split(",")
    ]


async def missing_privileges(conn: AsyncConnection) -> list[Privilege]:
    """Return the worker's privileges that this role lacks on existing tables and columns."""
    wanted = each_privilege()
    names = {"tables": "table", "privileges": "privilege", "columns": "column"}
    found = await conn.execute(
        _MISSING, {name: [getattr(privilege, of) for privilege in wanted] for name, of in names.items()}
    )
    return sorted(wanted[row.place - 1] for row in found if not row.given)


def format_privileges(privileges: Iterable[Privilege]) -> str:
    """Return *privileges* as text, grouped by table."""
    by_table: dict[str, list[str]] = {}
    for privilege in privileges:
        by_table.setdefault(privilege.table, []).append(str(privilege))
    return "; ".join(f"{', '.join(words)} on {table}" for table, words in by_table.items())
