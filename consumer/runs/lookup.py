"""Looks up stored runs; read-only."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy import Table, select
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.contract.scalars import derived_id, uuid_of
from consumer.phases import TransactionPhase
from domains.database.statements import columns_of, on_citus, unnest
from domains.run import RunKey
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
# Tenants that are listed if several have a run with one id.
TENANTS_AT_MOST = 50
# Tenants that are searched for a run by the runner's text id, which each tenant stores under another id.
_TENANTS_SEARCHED = 10_000
# Runs that are listed below the run that started them.
CHILDREN_AT_MOST = 50


class RunFile(Struct, frozen=True, kw_only=True):
    """All stored rows of one run, by table."""

    completion: Row
    incident: Row | None
    prevention_record: Row | None
    policy_evaluation: Row | None
    trace: Row | None
    suppressing_policy: Row | None
    children: list[Row]
    outbox: list[Row]
    rollbacks: list[Row]

    def phases(self) -> list[tuple[str, datetime | None]]:
        """Return the phases that the run has passed, with their times if stored."""
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
    engine: AsyncEngine,
    *,
    limit: int,
    tenant: str | None = None,
    phase: TransactionPhase | None = None,
    status: str | None = None,
    session: str | None = None,
    agent: str | None = None,
    model: str | None = None,
    error_code: str | None = None,
    severity: str | None = None,
    is_adjusted: bool = False,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[Row]:
    """Return the newest runs, received last first, with their incident's severity and their evaluation's outcome.

    *since* and *until* limit the time of receipt; the latter is not included.
    """
    run = run_completions
    query = (
        select(
            run.c.received_at, run.c.tenant_id, run.c.run_id, run.c.run_ref, run.c.agent_id, run.c.status,
            run.c.error_code, incidents.c.severity, policy_evaluations.c.outcome.label("policy"), run.c.phase,
            run.c.mode, run.c.committed_at, run.c.events_published_at,
        )
        .outerjoin(incidents, (incidents.c.tenant_id == run.c.tenant_id) & (incidents.c.run_id == run.c.run_id))
        .outerjoin(
            policy_evaluations,
            (policy_evaluations.c.tenant_id == run.c.tenant_id) & (policy_evaluations.c.run_id == run.c.run_id),
        )
        .order_by(run.c.received_at.desc())
        .limit(limit)
    )  # fmt: skip
    wanted = (
        (run.c.tenant_id, tenant), (run.c.phase, phase), (run.c.status, status), (run.c.session_id, session),
        (run.c.agent_id, agent), (run.c.model, model), (run.c.error_code, error_code), (incidents.c.severity, severity),
    )  # fmt: skip
    for column, value in wanted:
        if value is not None:
            query = query.where(column == value)
    if is_adjusted:
        query = query.where(run.c.adjustments.is_not(None))
    if until is not None:
        query = query.where(run.c.received_at < until)
    found: list[Row] = []
    async with engine.connect() as conn:
        # The BRIN index on received_at supports time ranges but not sorting, so the range is widened step by step.
        for window in (timedelta(minutes=10), timedelta(hours=6), timedelta(days=7), None):
            start = None if window is None else (until or datetime.now(UTC)) - window
            complete = since is not None and (start is None or start <= since)
            bound = since if complete else start
            recent = query if bound is None else query.where(run.c.received_at >= bound)
            found = [dict(row) for row in (await conn.execute(recent)).mappings()]
            if len(found) == limit or complete:
                break
    return found


async def owners(conn: AsyncConnection, text: str) -> list[RunKey]:
    """Return the keys of the runs that *text* names, a run's id or its ``run_ref``; at most ``TENANTS_AT_MOST``.

    The key begins with the tenant, so each tenant is looked up separately with two index lookups. By the run's id alone
    a server before PostgreSQL 18, which has no skip scan, would read the whole table. It might do so for an EXISTS too,
    which becomes a join; a scalar subquery does not. Citus, which needs PostgreSQL 16, refuses the recursion.
    """
    run_id = uuid_of(text)
    citus = on_citus(conn)
    if run_id is not None:
        owners = _OWNERS_ON_CITUS if citus else _OWNERS
        found = (await conn.execute(owners, {"run": run_id, "most": TENANTS_AT_MOST})).scalars()
        return [RunKey(tenant_id, run_id) for tenant_id in found]
    all_tenants = _ALL_TENANTS_ON_CITUS if citus else _ALL_TENANTS
    tenants = (await conn.execute(all_tenants, {"most": _TENANTS_SEARCHED})).scalars()
    keys = [RunKey(tenant_id, derived_id(tenant_id, text)) for tenant_id in tenants]
    stored = await conn.execute(_STORED_KEYS, columns_of(_KEYS, keys)) if keys else ()
    return [RunKey(*row) for row in stored][:TENANTS_AT_MOST]


_KEYS = ("tenant_id", "run_id")
_given = unnest(run_completions, _KEYS)
_STORED_KEYS = select(run_completions.c.tenant_id, run_completions.c.run_id).join(
    _given, (run_completions.c.tenant_id == _given.c.tenant_id) & (run_completions.c.run_id == _given.c.run_id)
)
_TENANTS = """
    WITH RECURSIVE tenants AS (
        (SELECT tenant_id FROM governance.run_completions ORDER BY tenant_id LIMIT 1)
        UNION ALL
        SELECT (SELECT later.tenant_id FROM governance.run_completions later
                 WHERE later.tenant_id > tenants.tenant_id ORDER BY later.tenant_id LIMIT 1)
          FROM tenants WHERE tenants.tenant_id IS NOT NULL
    )
"""
_ALL_TENANTS = sql(_TENANTS + " SELECT tenant_id FROM tenants WHERE tenant_id IS NOT NULL LIMIT :most")  # noqa: S608 - constants
_OWNERS = sql(
    _TENANTS  # noqa: S608 - constants
    + """
    SELECT tenant_id FROM tenants
     WHERE (SELECT true FROM governance.run_completions run
             WHERE run.tenant_id = tenants.tenant_id AND run.run_id = :run)
     LIMIT :most
    """
)


_ALL_TENANTS_ON_CITUS = sql("SELECT DISTINCT tenant_id FROM governance.run_completions LIMIT :most")
_OWNERS_ON_CITUS = sql("SELECT tenant_id FROM governance.run_completions WHERE run_id = :run LIMIT :most")


async def has_runs(conn: AsyncConnection, tenant_id: str) -> bool:
    """Return whether a run of *tenant_id* is stored."""
    query = select(run_completions.c.tenant_id).where(run_completions.c.tenant_id == tenant_id).limit(1)
    return (await conn.execute(query)).first() is not None


async def read_run(engine: AsyncEngine, run_id: UUID, *, tenant: str) -> RunFile | None:
    """Return all stored rows of the run."""
    async with engine.connect() as conn:
        found = await _rows(conn, run_completions, run_id, tenant)
        return await _file(conn, found[0]) if found else None


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
        children=await _children(conn, tenant, {completion["run_ref"] or str(run_id), str(run_id)}),
    )


async def _children(conn: AsyncConnection, tenant: str, names: set[str]) -> list[Row]:
    """Return the first runs that name their parent by one of *names*."""
    run = run_completions.c
    query = (
        select(run.run_id, run.run_ref, run.agent_id, run.status, run.started_at)
        .where(run.tenant_id == tenant, run.parent_run_id.in_(names))
        .order_by(run.started_at)
        .limit(CHILDREN_AT_MOST)
    )
    return [dict(row) for row in (await conn.execute(query)).mappings()]


async def _policy(conn: AsyncConnection, policy_id: UUID) -> Row | None:
    found = (await conn.execute(select(policies).where(policies.c.policy_id == policy_id))).mappings().one_or_none()
    return dict(found) if found else None


async def _rows(conn: AsyncConnection, table: Table, run_id: UUID, tenant: str) -> Sequence[Row]:
    of_run = (table.c.tenant_id == tenant, table.c.run_id == run_id)
    query = select(table).where(*of_run).order_by(*table.primary_key.columns)
    return [dict(row) for row in (await conn.execute(query)).mappings()]
