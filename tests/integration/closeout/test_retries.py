"""A run that fails for its own reason is retried later a bounded number of times, then parked."""

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select, text

from consumer import create_transaction_coordinator
from consumer.closeout.retries import retry_transient
from consumer.contract.names import RETRY_QUEUE
from consumer.parked.copies import headers_of
from domains import tables
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, count, repair_writes
from tests.support.traffic import eventually, parked, publish, published_runs, worker


async def test_a_failing_run_returns_from_the_retry_queue_and_is_parked_after_the_last_attempt(
    database_url, amqp_url, engine, broker
):
    await break_writes_to(engine, "traces", "the trace store is out of order")
    body = runs.body()
    before = datetime.now(UTC)
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="2"):
        await publish(broker, body, message_id="m-1", headers={"traceparent": "00-x"})
        (message,) = await parked(broker, 1)
    headers = headers_of(message)
    assert message.body == body
    assert (headers["x-closeout-reason"], headers["x-closeout-attempts"]) == ("attempts_exhausted", 2)
    assert "out of order" in str(headers["x-closeout-error"])
    assert (headers["traceparent"], message.header.properties.message_id) == ("00-x", "m-1")
    assert (headers["x-closeout-exchange"], headers["x-closeout-routing-key"]) == ("runs", "run.completed")
    first_seen, parked_at = (
        datetime.fromisoformat(str(headers[name])) for name in ("x-closeout-first-seen", "x-closeout-parked-at")
    )
    assert before <= first_seen < parked_at
    assert (parked_at - first_seen).total_seconds() > 9, "it waited in the retry queue"
    assert await count(engine, "rollbacks") == 2
    assert await count(engine, "run_completions") == 0


async def test_a_retry_closes_out_the_run_once_the_cause_is_fixed(database_url, amqp_url, engine, broker):
    await break_writes_to(engine, "traces")
    async with worker(database_url, amqp_url, TRUSTED_PUBLISHERS="closeout"):
        await publish(broker, runs.body(), user_id="closeout")
        await eventually(engine, select(func.count()).select_from(tables.rollbacks), 1)
        await repair_writes(engine)
        await eventually(engine, published_runs(), 1)
    channel = await broker.channel(confirms=False)
    assert (await channel.basic_get(RETRY_QUEUE)).delivery_tag is None


async def test_a_lost_session_is_retried_in_place_and_costs_no_attempt(database_url, amqp_url, engine, broker):
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="1") as service:
        for _ in range(5):
            await publish(broker, *[runs.body() for _ in range(20)])
            async with engine.begin() as conn:
                await conn.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
            await asyncio.sleep(0.1)
        await eventually(engine, published_runs(), 100)
        registry = service.worker._settler._metrics.registry
        for result in ("parked", "retried"):
            assert not registry.get_sample_value("closeout_deliveries_total", {"result": result})


@pytest.mark.parametrize("table", ["run_completions", "traces"])  # by SQLAlchemy, and straight to the driver
async def test_a_type_change_under_a_prepared_statement_is_retried_without_failing_the_run(engine, table):
    coordinator = create_transaction_coordinator(engine=engine)
    await coordinator.execute(runs.run())
    async with engine.begin() as conn:
        await conn.execute(text(f"ALTER TABLE governance.{table} ALTER COLUMN tenant_id TYPE varchar(200)"))
    run = runs.run()
    result = await retry_transient(lambda: coordinator.execute(run))
    assert result.state == "committed"
    assert await count(engine, "rollbacks") == 1
