"""Checks the invariants of every run from outside.

The tables are read in slices of the key, each in one REPEATABLE READ, read-only transaction. All rows of a run are in
one slice, so that live workers cause no false alarm, and no snapshot lasts long enough to keep vacuum from the outbox.
Every statement reads an index range of bounded size, for any table size.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.maintenance.invariants import INVARIANTS, Invariant

# Runs per slice: each statement takes about 30 ms, far below the statement timeout.
RUNS_A_SLICE = 10_000


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


class _Slice(NamedTuple):
    """A range of keys: after one, up to and including another; both are optional."""

    after: tuple[str, UUID] | None
    upto: tuple[str, UUID] | None
    tenant: str | None

    def bind(self, sql: str) -> TextClause:
        """Return *sql* with this slice's bounds in the place of ``SLICE(alias)``."""
        return text(re.sub(r"SLICE\((\w+)\)", lambda found: self._condition(found[1]), sql))

    def _condition(self, alias: str) -> str:
        # Missing bounds are omitted from the SQL: an OR would prevent the use of the index.
        bounds = [
            f"({alias}.tenant_id, {alias}.run_id) > (:after_tenant, :after_run)" if self.after else "",
            f"({alias}.tenant_id, {alias}.run_id) <= (:upto_tenant, :upto_run)" if self.upto else "",
            f"{alias}.tenant_id = :tenant" if self.tenant else "",
        ]
        return " AND ".join(bound for bound in bounds if bound) or "true"

    def values(self) -> dict[str, Any]:
        """Return the bounds by the names that :meth:`bind` gave them."""
        named: dict[str, Any] = {"tenant": self.tenant} if self.tenant else {}
        for name, key in (("after", self.after), ("upto", self.upto)):
            if key is not None:
                named |= {f"{name}_tenant": key[0], f"{name}_run": key[1]}
        return named


async def reconcile(
    engine: AsyncEngine,
    *,
    older_than_seconds: float,
    tenant: str | None = None,
    limit: int = 20,
    runs_a_slice: int = RUNS_A_SLICE,
) -> list[Finding]:
    """Check every invariant over all runs, or one tenant's; list at most *limit* runs of each. Changes nothing."""
    findings = [Finding(invariant) for invariant in INVARIANTS]
    async for conn, part in _slices(engine, tenant, runs_a_slice):
        for finding in findings:
            await _check(conn, part, finding, older_than_seconds=older_than_seconds, limit=limit)
    return findings


async def _slices(
    engine: AsyncEngine, tenant: str | None, runs_a_slice: int
) -> AsyncIterator[tuple[AsyncConnection, _Slice]]:
    """Yield each slice with a connection in a separate transaction, and so a separate snapshot."""
    after: tuple[str, UUID] | None = None
    while True:
        async with engine.connect() as opened:
            conn = await opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            rest = _Slice(after, None, tenant)
            found = await conn.execute(rest.bind(_LAST_OF_SLICE), rest.values() | {"runs": runs_a_slice - 1})
            last = found.one_or_none()
            upto = (last.tenant_id, last.run_id) if last else None
            yield conn, _Slice(after, upto, tenant)
        if upto is None:
            return
        after = upto


_LAST_OF_SLICE = """
    SELECT r.tenant_id, r.run_id FROM governance.run_completions r
     WHERE SLICE(r) ORDER BY r.tenant_id, r.run_id OFFSET :runs LIMIT 1
"""
_COUNTED = """
    SELECT broken.*, count(*) OVER () AS found FROM (BROKEN) broken ORDER BY tenant_id, run_id LIMIT :limit
"""


async def _check(
    conn: AsyncConnection, part: _Slice, finding: Finding, *, older_than_seconds: float, limit: int
) -> None:
    statement = part.bind(_COUNTED.replace("BROKEN", finding.invariant.sql))
    values = part.values() | {"limit": limit}
    if ":older_than" in finding.invariant.sql:
        values["older_than"] = older_than_seconds
    rows = (await conn.execute(statement, values)).all()
    if rows:
        finding.count += rows[0].found
        room = limit - len(finding.examples)
        finding.examples += [Broken(row.tenant_id, row.run_id, row.detail) for row in rows[:room]]
