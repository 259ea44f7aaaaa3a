"""Parts of the tables that one transaction reads, and what the placeholders of ``sources.py`` stand for in each.

Each slice is read in one REPEATABLE READ, read-only transaction, which is short: a snapshot keeps vacuum from the
outbox.
"""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.runs.pages import spans

# Runs per slice of keys, and pages of 8 KB per slice of a table: less than half a second each.
RUNS_A_SLICE = 50_000
PAGES_A_SLICE = 16_384
# Of a comparison of rows, the planner estimates only the first column. A slice within one tenant looks like a few rows,
# for which it would choose nested loops.
BY_RANGE = ("enable_nestloop", "enable_seqscan", "enable_bitmapscan")
# A slice of time is a few runs of a large table: its rows in the other tables are looked up.
_BY_TIME = ("enable_hashjoin", "enable_mergejoin", "enable_seqscan")


class Slice(Protocol):
    """A part of the tables."""

    def condition(self, placeholder: str, alias: str) -> str:
        """Return what *placeholder* stands for, as a condition on the table *alias*."""
        ...

    def values(self) -> dict[str, Any]:
        """Return the values of the parameters in the conditions."""
        ...


class Keys(NamedTuple):
    """A range of keys: after one, up to and including another; both are optional."""

    after: tuple[str, UUID] | None
    upto: tuple[str, UUID] | None
    tenant: str | None

    def condition(self, _placeholder: str, alias: str) -> str:
        """See :meth:`Slice.condition`."""
        # Missing bounds are omitted from the SQL: an OR would prevent the use of the index.
        bounds = [
            f"({alias}.tenant_id, {alias}.run_id) > (:after_tenant, :after_run)" if self.after else "",
            f"({alias}.tenant_id, {alias}.run_id) <= (:upto_tenant, :upto_run)" if self.upto else "",
            f"{alias}.tenant_id = :tenant" if self.tenant else "",
        ]
        return " AND ".join(bound for bound in bounds if bound) or "true"

    def values(self) -> dict[str, Any]:
        """See :meth:`Slice.values`."""
        named: dict[str, Any] = {"tenant": self.tenant} if self.tenant else {}
        for name, key in (("after", self.after), ("upto", self.upto)):
            if key is not None:
                named |= {f"{name}_tenant": key[0], f"{name}_run": key[1]}
        return named


class Pages(NamedTuple):
    """Pages of one table, from one to before another; the last slice has no end."""

    first: int
    end: int | None

    def condition(self, _placeholder: str, alias: str) -> str:
        """See :meth:`Slice.condition`."""
        # Literals: the planner estimates a range of pages only from these.
        end = f" AND {alias}.ctid < '({self.end},0)'::tid" if self.end is not None else ""
        return f"{alias}.ctid >= '({self.first},0)'::tid{end}"

    def values(self) -> dict[str, Any]:
        """See :meth:`Slice.values`."""
        return {}


class Received(NamedTuple):
    """The runs that were received from one time to before another."""

    since: datetime
    until: datetime
    tenant: str | None

    def condition(self, placeholder: str, alias: str) -> str:
        """See :meth:`Slice.condition`."""
        if placeholder == "ALSO":
            return "true"
        received = f"{alias if alias == 'r' else 'c'}.received_at"
        of_tenant = f" AND {alias}.tenant_id = :tenant" if self.tenant else ""
        period = f"{received} >= :received_since AND {received} < :received_until"
        if alias == "r":
            return period + of_tenant
        return (
            f"({alias}.tenant_id, {alias}.run_id) IN "  # noqa: S608 - constants
            f"(SELECT c.tenant_id, c.run_id FROM governance.run_completions c WHERE {period}){of_tenant}"
        )

    def values(self) -> dict[str, Any]:
        """See :meth:`Slice.values`."""
        named = {"received_since": self.since, "received_until": self.until}
        return named | ({"tenant": self.tenant} if self.tenant else {})


def bind(sql: str, part: Slice) -> TextClause:
    """Return *sql* with *part*'s conditions in the place of the placeholders."""
    return text(re.sub(r"\b(SLICE|ROWS|ALSO)\((\w+)\)", lambda found: part.condition(found[1], found[2]), sql))


@asynccontextmanager
async def _reading(engine: AsyncEngine, off: Sequence[str]) -> AsyncIterator[AsyncConnection]:
    """Begin a transaction on one snapshot, without the plans that *off* names."""
    async with engine.connect() as opened:
        conn = await opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        for name in off:
            await conn.execute(text(f"SET LOCAL {name} = off"))
        yield conn


async def by_key(
    engine: AsyncEngine, tenant: str | None, runs_a_slice: int
) -> AsyncIterator[tuple[AsyncConnection, Keys]]:
    """Yield each slice of keys with a connection in a separate transaction, and so a separate snapshot."""
    after: tuple[str, UUID] | None = None
    while True:
        async with _reading(engine, BY_RANGE) as conn:
            rest = Keys(after, None, tenant)
            found = await conn.execute(bind(_LAST_OF_SLICE, rest), rest.values() | {"runs": runs_a_slice - 1})
            last = found.one_or_none()
            upto = (last.tenant_id, last.run_id) if last else None
            yield conn, Keys(after, upto, tenant)
        if upto is None:
            return
        after = upto


async def by_page(engine: AsyncEngine, table: str) -> AsyncIterator[tuple[AsyncConnection, Pages]]:
    """Yield each slice of *table* in its physical order, as :func:`by_key` does.

    A row that a worker writes meanwhile may move to a slice that was read already: it is not checked.
    """
    async with engine.connect() as conn:
        number = (await conn.execute(text(_NUMBER_OF_PAGES), {"table": f"governance.{table}"})).scalar_one()
    starts = range(0, number + 1, PAGES_A_SLICE)
    for first in starts:
        async with _reading(engine, BY_RANGE) as conn:
            yield conn, Pages(first, first + PAGES_A_SLICE if first != starts[-1] else None)


async def by_time(
    engine: AsyncEngine, since: datetime, tenant: str | None, runs_a_slice: int
) -> AsyncIterator[tuple[AsyncConnection, Received]]:
    """Yield each slice of time from now back to *since*, as :func:`by_key` does."""
    until = now = datetime.now(UTC)
    async with engine.connect() as opened:
        conn = await opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        ends = [span.last.received_at async for span in spans(conn, since=since, until=now, size=runs_a_slice)]
    for start in dict.fromkeys([*ends, since]):
        if start < until:
            async with _reading(engine, _BY_TIME) as conn:
                yield conn, Received(start, until, tenant)
            until = start


_LAST_OF_SLICE = """
    SELECT r.tenant_id, r.run_id FROM governance.run_completions r
     WHERE SLICE(r) ORDER BY r.tenant_id, r.run_id OFFSET :runs LIMIT 1
"""
_NUMBER_OF_PAGES = "SELECT pg_relation_size(:table) / current_setting('block_size')::int"
