"""Reading back what is stored of runs; nothing here writes."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.phases import TransactionPhase
from domains.tables import (
    incidents,
    outbox_events,
    policies,
    policy_evaluations,
    prevention_records,
    rollbacks,
    run_completions,
    traces,
)

Row = dict[str, Any]


class RunFile(Struct, frozen=True, kw_only=True):
    """All that is stored of one run, a row of each table."""

    completion: Row
    incident: Row | None
    prevention_record: Row | None
    policy_evaluation: Row | None
    trace: Row | None
    suppressing_policy: Row | None
    outbox: list[Row]
    rollbacks: list[Row]

    def phases(self) -> list[tuple[str, datetime | None]]:
        """Return the phases that the run has passed, and when, where a row tells."""
        raised = self.incident or self.prevention_record
        passed: list[tuple[TransactionPhase, Row | None, str]] = [
            (TransactionPhase.NOT_STARTED, self.completion, "received_at"),
            (TransactionPhase.INCIDENT_CREATED, raised, "created_at"),
            (TransactionPhase.POLICY_EVALUATED, self.policy_evaluation, "evaluated_at"),
            (TransactionPhase.TRACE_COMPLETED, None, ""),
            (TransactionPhase.COMMITTED, self.completion, "committed_at"),
            (TransactionPhase.EVENTS_PUBLISHED, self.completion, "events_published_at"),
        ]
        order = list(TransactionPhase)
        reached = order.index(TransactionPhase(self.completion["phase"]))
        return [
            (phase.value, row[name] if row else None) for phase, row, name in passed if order.index(phase) <= reached
        ]


async def list_runs(
    engine: AsyncEngine, *, tenant: str | None, phase: TransactionPhase | None, status: str | None, limit: int
) -> list[Row]:
    """Return the newest runs, received last first, with their incident's severity and their evaluation's outcome."""
    run = run_completions
    query = (
        select(
            run.c.received_at, run.c.tenant_id, run.c.run_id, run.c.agent_id, run.c.status, run.c.error_code,
            incidents.c.severity, policy_evaluations.c.outcome.label("policy"), run.c.phase, run.c.mode,
            run.c.committed_at, run.c.events_published_at,
        )
        .outerjoin(incidents, (incidents.c.tenant_id == run.c.tenant_id) & (incidents.c.run_id == run.c.run_id))
        .outerjoin(
            policy_evaluations,
            (policy_evaluations.c.tenant_id == run.c.tenant_id) & (policy_evaluations.c.run_id == run.c.run_id),
        )
        .order_by(run.c.received_at.desc())
        .limit(limit)
    )  # fmt: skip
    for column, value in ((run.c.tenant_id, tenant), (run.c.phase, phase), (run.c.status, status)):
        if value is not None:
            query = query.where(column == value)
    found: list[Row] = []
    async with engine.connect() as conn:
        # received_at has a BRIN index: good at a range of time, no help in sorting. So the range grows instead.
        for window in (timedelta(minutes=10), timedelta(hours=6), timedelta(days=7), None):
            recent = query if window is None else query.where(run.c.received_at > datetime.now(UTC) - window)
            found = [dict(row) for row in (await conn.execute(recent)).mappings()]
            if len(found) == limit:
                break
    return found


async def read_run(engine: AsyncEngine, run_id: UUID, *, tenant: str | None) -> list[RunFile]:
    """Return what is stored of the run, once for each tenant that has one of this id."""
    async with engine.connect() as conn:
        found = await _rows(conn, run_completions, run_id, tenant)
        return [await _file(conn, row) for row in found]


async def _file(conn: AsyncConnection, completion: Row) -> RunFile:
    tenant, run_id = completion["tenant_id"], completion["run_id"]

    async def one(table: Table) -> Row | None:
        rows = await _rows(conn, table, run_id, tenant)
        return rows[0] if rows else None

    prevention = await one(prevention_records)
    return RunFile(
        completion={**completion, "payload_digest": completion["payload_digest"].hex()},
        incident=await one(incidents),
        prevention_record=prevention,
        policy_evaluation=await one(policy_evaluations),
        trace=await one(traces),
        suppressing_policy=await _policy(conn, prevention["policy_id"]) if prevention else None,
        outbox=list(await _rows(conn, outbox_events, run_id, tenant)),
        rollbacks=list(await _rows(conn, rollbacks, run_id, tenant)),
    )


async def _policy(conn: AsyncConnection, policy_id: UUID) -> Row | None:
    found = (await conn.execute(select(policies).where(policies.c.policy_id == policy_id))).mappings().one_or_none()
    return dict(found) if found else None


async def _rows(conn: AsyncConnection, table: Table, run_id: UUID, tenant: str | None) -> Sequence[Row]:
    query = select(table).where(table.c.run_id == run_id).order_by(*table.primary_key.columns)
    if tenant is not None:
        query = query.where(table.c.tenant_id == tenant)
    return [dict(row) for row in (await conn.execute(query)).mappings()]
