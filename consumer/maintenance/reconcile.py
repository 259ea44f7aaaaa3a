"""Checks the invariants of every run from outside.

The tables are read in slices, each in one REPEATABLE READ, read-only transaction. Each statement sees one snapshot, so
that live workers cause no false alarm, and no snapshot lasts long enough to keep vacuum from the outbox. Conditions on
keys read ranges of the indexes. Other conditions read the table in its physical order: its rows by the index are
everywhere in the table, and each would be another page.
"""

import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.maintenance.invariants import (
    INVARIANTS,
    KEYS,
    RUNS,
    SOURCES,
    TRACES,
    WAITING,
    Check,
    Invariant,
    Statement,
)
from consumer.runs.pages import spans
from domains.database.statements import on_citus

# Runs per slice of keys, and pages of 8 KB per slice of a table: less than half a second each.
RUNS_A_SLICE = 50_000
_PAGES_A_SLICE = 16_384
# Of a comparison of rows, the planner estimates only the first column. A slice within one tenant looks like a few rows,
# for which it would choose nested loops.
_BY_RANGE = ("enable_nestloop", "enable_seqscan", "enable_bitmapscan")
# A slice of time is a few runs of a large table: its rows in the other tables are looked up.
_BY_TIME = ("enable_hashjoin", "enable_mergejoin", "enable_seqscan")


class Broken(NamedTuple):
    """A run that violates an invariant, and how."""

    tenant_id: str
    run_id: UUID
    detail: str


@dataclass(slots=True)
class Finding:
    """The violations of one invariant: their number, and the first of them."""

    invariant: Invariant
    count: int = 0
    examples: list[Broken] = field(default_factory=list)

    def add(self, count: int, broken: Sequence[Broken], limit: int) -> None:
        """Count *count* violations, and keep the first of them up to *limit* in all."""
        self.count += count
        self.examples += broken[: limit - len(self.examples)]


class _Slice(Protocol):
    """A part of the tables."""

    def condition(self, placeholder: str, alias: str) -> str:
        """Return what *placeholder* stands for, as a condition on the table *alias*."""
        ...

    def values(self) -> dict[str, Any]:
        """Return the values of the parameters in the conditions."""
        ...


class _Keys(NamedTuple):
    """A range of keys: after one, up to and including another; both are optional."""

    after: tuple[str, UUID] | None
    upto: tuple[str, UUID] | None
    tenant: str | None

    def condition(self, _placeholder: str, alias: str) -> str:
        # Missing bounds are omitted from the SQL: an OR would prevent the use of the index.
        bounds = [
            f"({alias}.tenant_id, {alias}.run_id) > (:after_tenant, :after_run)" if self.after else "",
            f"({alias}.tenant_id, {alias}.run_id) <= (:upto_tenant, :upto_run)" if self.upto else "",
            f"{alias}.tenant_id = :tenant" if self.tenant else "",
        ]
        return " AND ".join(bound for bound in bounds if bound) or "true"

    def values(self) -> dict[str, Any]:
        named: dict[str, Any] = {"tenant": self.tenant} if self.tenant else {}
        for name, key in (("after", self.after), ("upto", self.upto)):
            if key is not None:
                named |= {f"{name}_tenant": key[0], f"{name}_run": key[1]}
        return named


class _Pages(NamedTuple):
    """Pages of one table, from one to before another; the last slice has no end."""

    first: int
    end: int | None

    def condition(self, _placeholder: str, alias: str) -> str:
        # Literals: the planner estimates a range of pages only from these.
        end = f" AND {alias}.ctid < '({self.end},0)'::tid" if self.end is not None else ""
        return f"{alias}.ctid >= '({self.first},0)'::tid{end}"

    def values(self) -> dict[str, Any]:
        return {}


class _Received(NamedTuple):
    """The runs that were received from one time to before another."""

    since: datetime
    until: datetime
    tenant: str | None

    def condition(self, placeholder: str, alias: str) -> str:
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
        named = {"received_since": self.since, "received_until": self.until}
        return named | ({"tenant": self.tenant} if self.tenant else {})


def _bind(sql: str, part: _Slice) -> TextClause:
    """Return *sql* with *part*'s conditions in the place of the placeholders."""
    return text(re.sub(r"\b(SLICE|ROWS|ALSO)\((\w+)\)", lambda found: part.condition(found[1], found[2]), sql))


async def reconcile(
    engine: AsyncEngine,
    *,
    older_than_seconds: float,
    tenant: str | None = None,
    since: datetime | None = None,
    limit: int = 20,
    runs_a_slice: int = RUNS_A_SLICE,
) -> list[Finding]:
    """Check every invariant over all runs, or one tenant's; list at most *limit* runs of each. Changes nothing.

    With *since*, only the runs received from then on are read; rows that belong to no run are not found.
    """
    invariants = [one for one in INVARIANTS if since is None or not any(map(_of_orphans, one.checks))]
    check = _Checker([Finding(invariant) for invariant in invariants], older_than_seconds, limit)
    if since is not None:
        async for conn, received in _by_time(engine, since, tenant, runs_a_slice):
            await check(conn, received, *SOURCES, statements=True)
        return check.findings
    async with engine.connect() as conn:
        by_page = tenant is None and not on_citus(conn)
    sources = (KEYS, WAITING) if by_page else tuple(SOURCES)
    async for conn, keys in _by_key(engine, tenant, runs_a_slice):
        await check(conn, keys, *sources, statements=True)
    for source, table in ((RUNS, "run_completions"), (TRACES, "traces")) if by_page else ():
        async for conn, pages in _by_page(engine, table):
            await check(conn, pages, source)
    return check.findings


def _of_orphans(check: Check | Statement) -> bool:
    return isinstance(check, Statement) and check.of_orphans


@asynccontextmanager
async def _reading(engine: AsyncEngine, off: Sequence[str]) -> AsyncIterator[AsyncConnection]:
    """Begin a transaction on one snapshot, without the plans that *off* names."""
    async with engine.connect() as opened:
        conn = await opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        for name in off:
            await conn.execute(text(f"SET LOCAL {name} = off"))
        yield conn


async def _by_key(
    engine: AsyncEngine, tenant: str | None, runs_a_slice: int
) -> AsyncIterator[tuple[AsyncConnection, _Keys]]:
    """Yield each slice of keys with a connection in a separate transaction, and so a separate snapshot."""
    after: tuple[str, UUID] | None = None
    while True:
        async with _reading(engine, _BY_RANGE) as conn:
            rest = _Keys(after, None, tenant)
            found = await conn.execute(_bind(_LAST_OF_SLICE, rest), rest.values() | {"runs": runs_a_slice - 1})
            last = found.one_or_none()
            upto = (last.tenant_id, last.run_id) if last else None
            yield conn, _Keys(after, upto, tenant)
        if upto is None:
            return
        after = upto


async def _by_page(engine: AsyncEngine, table: str) -> AsyncIterator[tuple[AsyncConnection, _Pages]]:
    """Yield each slice of *table* in its physical order, as :func:`_by_key` does.

    A row that a worker writes meanwhile may move to a slice that was read already: it is not checked.
    """
    async with engine.connect() as conn:
        number = (await conn.execute(text(_NUMBER_OF_PAGES), {"table": f"governance.{table}"})).scalar_one()
    starts = range(0, number + 1, _PAGES_A_SLICE)
    for first in starts:
        async with _reading(engine, _BY_RANGE) as conn:
            yield conn, _Pages(first, first + _PAGES_A_SLICE if first != starts[-1] else None)


async def _by_time(
    engine: AsyncEngine, since: datetime, tenant: str | None, runs_a_slice: int
) -> AsyncIterator[tuple[AsyncConnection, _Received]]:
    """Yield each slice of time from now back to *since*, as :func:`_by_key` does."""
    until = now = datetime.now(UTC)
    async with engine.connect() as opened:
        conn = await opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        ends = [span.last.received_at async for span in spans(conn, since=since, until=now, size=runs_a_slice)]
    for start in dict.fromkeys([*ends, since]):
        if start < until:
            async with _reading(engine, _BY_TIME) as conn:
                yield conn, _Received(start, until, tenant)
            until = start


_LAST_OF_SLICE = """
    SELECT r.tenant_id, r.run_id FROM governance.run_completions r
     WHERE SLICE(r) ORDER BY r.tenant_id, r.run_id OFFSET :runs LIMIT 1
"""
_NUMBER_OF_PAGES = "SELECT pg_relation_size(:table) / current_setting('block_size')::int"
_COUNTED = """
    SELECT broken.*, count(*) OVER () AS found FROM (BROKEN) broken ORDER BY tenant_id, run_id LIMIT :limit
"""


class _Checker:
    """Checks slices, and adds what it finds to the findings."""

    def __init__(self, findings: list[Finding], older_than_seconds: float, limit: int) -> None:
        self.findings = findings
        self._older_than = older_than_seconds
        self._limit = limit

    async def __call__(self, conn: AsyncConnection, part: _Slice, *sources: str, statements: bool = False) -> None:
        """Check the rows of *sources* in *part*, and with *statements* those that the statements read."""
        for source in sources:
            await self._check_source(conn, part, source)
        for finding in self.findings:
            for check in finding.invariant.checks:
                if statements and isinstance(check, Statement):
                    await self._execute(conn, part, finding, check.sql)

    async def _check_source(self, conn: AsyncConnection, part: _Slice, source: str) -> None:
        sql = self.statement(source)
        findings = [finding for finding, _ in self._checks(source)]
        for tenant_id, run_id, *details in await conn.execute(_bind(sql, part), self._values(sql, part)):
            for finding, detail in zip(findings, details, strict=True):
                if detail is not None:
                    finding.add(1, [Broken(tenant_id, run_id, detail)], self._limit)

    def statement(self, source: str) -> str:
        """Return a query for the rows of *source* that violate a rule, with a column of details for each check."""
        checks = [check for _, check in self._checks(source)]
        details = ", ".join(f"CASE WHEN {check.condition} THEN {check.detail} END" for check in checks)
        violated = " OR ".join(f"({check.condition})" for check in checks)
        key = f"{SOURCES[source]}.tenant_id, {SOURCES[source]}.run_id"
        return f"SELECT {key}, {details} {source} AND ({violated}) ORDER BY {key}"

    async def _execute(self, conn: AsyncConnection, part: _Slice, finding: Finding, statement: str) -> None:
        sql = _COUNTED.replace("BROKEN", statement)
        rows = (await conn.execute(_bind(sql, part), self._values(sql, part) | {"limit": self._limit})).all()
        if rows:
            finding.add(rows[0].found, [Broken(row.tenant_id, row.run_id, row.detail) for row in rows], self._limit)

    def _checks(self, source: str) -> Iterator[tuple[Finding, Check]]:
        for finding in self.findings:
            for check in finding.invariant.checks:
                if isinstance(check, Check) and check.source == source:
                    yield finding, check

    def _values(self, sql: str, part: _Slice) -> dict[str, Any]:
        return part.values() | ({"older_than": self._older_than} if ":older_than" in sql else {})
