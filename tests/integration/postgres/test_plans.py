"""The query plans of a batch: only lookups by key, regardless of table size."""

from sqlalchemy import text

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.postgres.engine import create_engine
from domains.policies.book import PolicyBook
from tests.support import run_messages as runs

GROWING = ("run_completions", "incidents", "policy_evaluations", "traces", "outbox_events")


async def test_no_close_out_statement_scans_a_growing_table(database_url, engine, broker):
    closing_out = create_engine(database_url, pool_size=1, by_key=True)
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=Metrics())
    coordinator = RunCompletionTransaction(engine=closing_out, policies=PolicyBook(), publisher=publisher)
    before = await _scans(engine)
    for _ in range(5):
        batch = [runs.run() for _ in range(50)]
        await _begin_traces(engine, batch[:10])
        done = await coordinator.execute_many(batch)
        assert {result.phase for result in done} == {"EVENTS_PUBLISHED"}
        assert [result.results[2].action for result in done] == ["completed"] * 10 + ["created"] * 40
        await coordinator.execute_many(batch)
    async with closing_out.connect() as conn:
        await conn.execute(text("SELECT pg_stat_force_next_flush()"))
    await closing_out.dispose()

    assert await _scans(engine) == before


async def _begin_traces(engine, batch) -> None:
    async with engine.begin() as conn:
        for run in batch:
            await conn.execute(
                text(
                    "INSERT INTO governance.traces (tenant_id, trace_id, run_id, status, started_at) "
                    "VALUES (:tenant, :trace, :run, 'running', now())"
                ),
                {"tenant": run.tenant_id, "trace": run.trace_id, "run": run.run_id},
            )


async def _scans(engine) -> dict[str, int]:
    async with engine.connect() as conn:
        found = await conn.execute(
            text("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname = ANY(:tables) ORDER BY 1"),
            {"tables": list(GROWING)},
        )
        return {row.relname: row.seq_scan for row in found}
