"""Checks the invariants of every run from outside.

The tables are read in slices, so that no snapshot lasts long enough to keep vacuum from the outbox. Each statement sees
one snapshot: live workers cause no false alarm. Conditions on keys read ranges of the indexes. Other conditions read
the table in its physical order: in the order of the index, each row would be on another page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.maintenance.invariants import INVARIANTS, Check, Invariant, Statement
from consumer.maintenance.slices import RUNS_A_SLICE, Slice, bind, by_key, by_page, by_time
from consumer.maintenance.sources import KEYS, RUNS, SOURCES, TRACES, WAITING
from domains.database.statements import on_citus


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
        async for conn, received in by_time(engine, since, tenant, runs_a_slice):
            await check(conn, received, *SOURCES, statements=True)
        return check.findings
    async with engine.connect() as conn:
        in_order = tenant is None and not on_citus(conn)  # tables can be read in their physical order
    sources = (KEYS, WAITING) if in_order else tuple(SOURCES)
    async for conn, keys in by_key(engine, tenant, runs_a_slice):
        await check(conn, keys, *sources, statements=True)
    for source, table in ((RUNS, "run_completions"), (TRACES, "traces")) if in_order else ():
        async for conn, pages in by_page(engine, table):
            await check(conn, pages, source)
    return check.findings


def _of_orphans(check: Check | Statement) -> bool:
    return isinstance(check, Statement) and check.of_orphans


_COUNTED = """
    SELECT broken.*, count(*) OVER () AS found FROM (BROKEN) broken ORDER BY tenant_id, run_id LIMIT :limit
"""


class _Checker:
    """Checks slices, and adds what it finds to the findings."""

    def __init__(self, findings: list[Finding], older_than_seconds: float, limit: int) -> None:
        self.findings = findings
        self._older_than = older_than_seconds
        self._limit = limit

    async def __call__(self, conn: AsyncConnection, part: Slice, *sources: str, statements: bool = False) -> None:
        """Check the rows of *sources* in *part*, and with *statements* those that the statements read."""
        for source in sources:
            await self._check_source(conn, part, source)
        for finding in self.findings:
            for check in finding.invariant.checks:
                if statements and isinstance(check, Statement):
                    await self._execute(conn, part, finding, check.sql)

    async def _check_source(self, conn: AsyncConnection, part: Slice, source: str) -> None:
        sql = self.statement(source)
        findings = [finding for finding, _ in self._checks(source)]
        for tenant_id, run_id, *details in await conn.execute(bind(sql, part), self._values(sql, part)):
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

    async def _execute(self, conn: AsyncConnection, part: Slice, finding: Finding, statement: str) -> None:
        sql = _COUNTED.replace("BROKEN", statement)
        rows = (await conn.execute(bind(sql, part), self._values(sql, part) | {"limit": self._limit})).all()
        if rows:
            finding.add(rows[0].found, [Broken(row.tenant_id, row.run_id, row.detail) for row in rows], self._limit)

    def _checks(self, source: str) -> Iterator[tuple[Finding, Check]]:
        for finding in self.findings:
            for check in finding.invariant.checks:
                if isinstance(check, Check) and check.source == source:
                    yield finding, check

    def _values(self, sql: str, part: Slice) -> dict[str, Any]:
        return part.values() | ({"older_than": self._older_than} if ":older_than" in sql else {})
