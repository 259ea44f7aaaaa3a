"""The statements that a close-out sends to Citus, executed by PostgreSQL, give the same rows as its usual ones."""

from typing import Any
from uuid import uuid4

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.outbox import store
from domains.database import statements
from domains.run import CompletedRun
from tests.support import run_messages as runs

TENANTS = ("acme", "globex")
TABLES = ("run_completions", "incidents", "prevention_records", "policy_evaluations", "traces", "outbox_events")
# What differs between any two close-outs.
OWN = (
    "received_at", "committed_at", "incident_id", "created_at", "policy_evaluation_id", "evaluated_at", "event_id",
    "body", "prevention_record_id", "events_published_at",
)  # fmt: skip


def batch() -> list[CompletedRun]:
    """More runs than one statement inserts, of two tenants, with and without a trace."""
    return [
        runs.run(tenant_id=TENANTS[n % 2], run_id=str(uuid4()), trace_id=str(uuid4()) if n % 3 else None)
        for n in range(2 * statements.ROWS_MAX + 1)
    ]


async def stored(engine: AsyncEngine) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    async with engine.begin() as conn:
        for table in TABLES:
            found = await conn.execute(
                text(f"SELECT to_jsonb(t) - '{{{','.join(OWN)}}}'::text[] FROM governance.{table} t")
            )
            rows[table] = sorted(found.scalars(), key=repr)
            await conn.execute(text(f"DELETE FROM governance.{table}"))
    return rows


async def closed_out(engine: AsyncEngine, batch: list[CompletedRun]) -> dict[str, list[dict[str, Any]]]:
    coordinator = create_transaction_coordinator(engine=engine)
    first = await coordinator.execute_many(batch)
    again = await coordinator.execute_many(batch[:3])
    assert {result.state for result in first} == {"committed"}
    assert {result.state for result in again} == {"duplicate"}
    async with engine.begin() as conn:
        found = await store.unpublished(conn, [run.key for run in batch])
        await store.mark(conn, found.events[: len(found.events) // 2])
    return await stored(engine)


async def test_the_forms_for_citus_store_the_same_rows(engine, monkeypatch):
    given = batch()
    usual = await closed_out(engine, given)
    monkeypatch.setattr(statements, "on_citus", lambda _conn: True)
    assert await closed_out(engine, given) == usual
    assert len(usual["run_completions"]) == len(given)


async def test_an_insert_for_citus_has_no_select(engine, monkeypatch):
    """Citus commits an INSERT ... SELECT in two phases, even one that changes rows on one node."""
    sent: list[str] = []

    @event.listens_for(engine.sync_engine, "checkout")
    def log_queries(session, _record, _proxy):
        session.driver_connection.add_query_logger(lambda record: sent.append(record.query))

    monkeypatch.setattr(statements, "on_citus", lambda _conn: True)
    await create_transaction_coordinator(engine=engine).execute_many([runs.run()])
    inserts = [statement for statement in sent if statement.startswith("INSERT")]
    assert len(inserts) == 5
    assert not [statement for statement in inserts if "SELECT" in statement]
