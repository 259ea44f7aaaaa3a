"""Writes incidents and prevention records, many per statement."""

from collections.abc import Sequence
from operator import attrgetter

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.database.statements import Compiled, columns_of, insert_many, insert_row
from domains.incidents.rules import Finding, Incident, Prevention
from domains.incidents.tables import incidents, prevention_records
from domains.result import DomainResult
from domains.run import RunKey

_INCIDENT = tuple(incidents.c.keys())
_PREVENTION = tuple(prevention_records.c.keys())
_INSERT_INCIDENTS = Compiled(insert_many(incidents, _INCIDENT), on_citus=insert_row(incidents, _INCIDENT))
_INSERT_PREVENTIONS = Compiled(
    insert_many(prevention_records, _PREVENTION), on_citus=insert_row(prevention_records, _PREVENTION)
)
_incident_row = attrgetter(*_INCIDENT)
_prevention_row = attrgetter(*_PREVENTION)


async def record(conn: AsyncConnection, findings: Sequence[Finding]) -> dict[RunKey, DomainResult]:
    """Write one incident or prevention record for each of *findings*, in one statement per kind.

    Not idempotent: it depends on the claim made earlier in the same transaction.
    """
    raised = [finding for finding in findings if isinstance(finding, Incident)]
    prevented = [finding for finding in findings if isinstance(finding, Prevention)]
    if raised:
        await _INSERT_INCIDENTS.execute(conn, columns_of(_INCIDENT, map(_incident_row, raised)))
    if prevented:
        await _INSERT_PREVENTIONS.execute(conn, columns_of(_PREVENTION, map(_prevention_row, prevented)))
    return {finding.key: result_of(finding) for finding in findings}


async def record_once(conn: AsyncConnection, finding: Finding) -> Finding:
    """Write *finding* unless its run has an incident or prevention record, and return the stored one.

    For the legacy path, where a redelivery may find the work partly done. Depends on the caller's lock on the run's
    inbox row: a key cannot exclude rows of two tables.
    """
    existing = await stored_finding(conn, finding.key)
    if existing is None:
        await record(conn, [finding])
        return finding
    return existing


async def stored_finding(conn: AsyncConnection, key: RunKey) -> Finding | None:
    """Return the incident or prevention record that is stored for the run, if any."""
    for table, kind in ((incidents, Incident), (prevention_records, Prevention)):
        found = await conn.execute(
            select(table).where(table.c.tenant_id == key.tenant_id, table.c.run_id == key.run_id)
        )
        row = found.mappings().one_or_none()
        if row is not None:
            return kind(**row)
    return None


def result_of(finding: Finding) -> DomainResult:
    """Return the domain result for the written *finding*."""
    if isinstance(finding, Incident):
        return DomainResult("incidents", "created", finding.incident_id)
    return DomainResult("incidents", "created", finding.prevention_record_id, "suppressed by a policy")
