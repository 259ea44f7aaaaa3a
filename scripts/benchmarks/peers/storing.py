"""The peers' engine, and one run's statements as SQLAlchemy Core's documentation writes them."""

import os

from sqlalchemy import Update, delete, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.sql import func

from benchmarks.peers.work import AT_ONCE, SELECT_POLICIES, Rows, json_text, policies_in_force
from domains.policies.rules import PolicySet
from domains.run import RunKey
from domains.tables import incidents, outbox_events, policy_evaluations, prevention_records, run_completions, traces

EVENT = ("tenant_id", "run_id", "sequence", "event_id", "type", "routing_key", "body")


def engine_of_peer() -> AsyncEngine:
    """Return an engine with one pooled connection per concurrent message."""
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://")
    return create_async_engine(url, pool_size=AT_ONCE, max_overflow=0, pool_use_lifo=True, json_serializer=json_text)


async def read_policies(engine: AsyncEngine) -> PolicySet:
    """Return the policies in force."""
    async with engine.connect() as conn:
        return policies_in_force([dict(row) for row in (await conn.execute(SELECT_POLICIES)).mappings()])


_CLAIM = insert(run_completions).on_conflict_do_nothing().returning(run_completions.c.run_id)
_TRACE = insert(traces).on_conflict_do_nothing().returning(traces.c.run_id)


async def write(conn: AsyncConnection, rows: Rows) -> bool:
    """Write one run's rows; return false for a duplicate, and write nothing."""
    if (await conn.execute(_CLAIM, rows.completion)).one_or_none() is None:
        return False
    if rows.incident is not None:
        await conn.execute(incidents.insert(), rows.incident)
    if rows.prevention is not None:
        await conn.execute(prevention_records.insert(), rows.prevention)
    await conn.execute(policy_evaluations.insert(), rows.evaluation)
    if rows.trace is not None and (await conn.execute(_TRACE, rows.trace)).one_or_none() is None:
        await conn.execute(completion_of(rows.trace))
    await conn.execute(
        insert(outbox_events).values([{name: getattr(event, name) for name in EVENT} for event in rows.events])
    )
    return True


def completion_of(trace: dict[str, object]) -> Update:
    """Return the update that completes a trace which the runner inserted."""
    key = ("tenant_id", "trace_id", "run_id")
    return (
        update(traces)
        .where(*(traces.c[name] == trace[name] for name in key), traces.c.status == "running")
        .values({name: trace[name] for name in ("status", "started_at", "completed_at", "steps")})
    )


async def mark(conn: AsyncConnection, key: RunKey) -> None:
    """Mark a run's events as confirmed."""
    events, runs = outbox_events, run_completions
    await conn.execute(delete(events).where(events.c.tenant_id == key.tenant_id, events.c.run_id == key.run_id))
    await conn.execute(
        update(runs)
        .where(runs.c.tenant_id == key.tenant_id, runs.c.run_id == key.run_id)
        .values(phase="EVENTS_PUBLISHED", events_published_at=func.clock_timestamp())
    )
