"""A complete worker on both real servers, in the test's event loop."""

import gc
import json

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.amqp.acks import Acks
from consumer.amqp.connection import BrokerConnection
from consumer.assembly import Service
from consumer.closeout.inbox import Arrival
from consumer.contract.run_message import decode
from consumer.parked.copies import headers_of
from domains import tables
from tests.support import run_messages as runs
from tests.support.http import ready, request
from tests.support.traffic import (
    emptied,
    eventually,
    length_without_consumers,
    listen,
    parked,
    publish,
    published_runs,
    received,
    worker,
)
from tests.support.waiting import until


async def test_published_runs_are_committed_acked_and_their_events_published_in_order(
    database_url, amqp_url, engine, broker
):
    events = await listen(broker)
    bodies = [runs.body() for _ in range(120)]
    async with worker(database_url, amqp_url):
        await publish(broker, *bodies)
        await eventually(engine, published_runs(), 120)
    assert len(await received(events, 360)) == 360
    for body in bodies:
        mine = [e for e in events if e.header.properties.correlation_id == str(runs.run_id_of(body))]
        assert [e.header.properties.message_type for e in mine] == [
            "incident.created",
            "policy.evaluated",
            "run.finalized",
        ]
    async with engine.connect() as conn:
        assert (await conn.execute(select(func.count()).select_from(tables.outbox_events))).scalar_one() == 0
    assert await length_without_consumers(broker, "closeout.run-completed") == 0


async def test_a_duplicate_run_publishes_no_further_event(database_url, amqp_url, engine, broker):
    body = runs.body()
    events = await listen(broker)
    async with worker(database_url, amqp_url) as service:
        await publish(broker, *[body] * 30)
        await eventually(engine, published_runs(), 1)
        await until(lambda: _value(service, "closeout_deliveries_total", result="duplicate") == 29)
    assert len({e.header.properties.message_id for e in await received(events, 3)}) == 3


BAD = {
    "invalid_json": b"{nonsense",
    "schema_violation": runs.body(status="done"),
    "unsupported_schema_version": runs.body(schema_version=2),
    "too_large": runs.body(error_message="x" * 1_100_000),
}


async def test_an_invalid_message_is_parked_unmodified_and_other_runs_continue(database_url, amqp_url, engine, broker):
    good = runs.body()
    async with worker(database_url, amqp_url):
        await publish(
            broker,
            *BAD.values(),
            message_id="m-1",
            correlation_id="c-1",
            priority=3,
            app_id="runner",
            headers={"traceparent": "00-x", "n": 5, "CC": ["closeout.run-completed"]},
            expiration="60000",
        )
        await publish(broker, good)
        found = await parked(broker, len(BAD))
        await eventually(engine, published_runs(), 1)
    assert {headers_of(m)["x-closeout-reason"]: m.body for m in found} == BAD
    for message in found:
        properties, headers = message.header.properties, headers_of(message)
        assert (properties.message_id, properties.correlation_id, properties.priority, properties.app_id) == (
            "m-1",
            "c-1",
            3,
            "runner",
        )
        assert properties.content_type == "application/json"
        assert (headers["traceparent"], headers["n"]) == ("00-x", 5)
        assert headers["x-closeout-exchange"] == "runs"
        assert headers["x-closeout-routing-key"] == "run.completed"
        assert headers["x-closeout-attempts"] == 0
        assert headers["x-closeout-error"]
        # Properties that would make the broker drop or reroute the copy are moved to headers.
        assert (properties.expiration, headers["x-closeout-expiration"]) == (None, "60000")
        assert headers["x-closeout-cc"] == ["closeout.run-completed"]


async def test_a_conflicting_duplicate_is_parked(database_url, amqp_url, engine, broker):
    fields = runs.message()
    async with worker(database_url, amqp_url):
        await publish(broker, runs.body(fields))
        await eventually(engine, published_runs(), 1)
        await publish(broker, runs.body({**fields, "model": "another"}))
        (message,) = await parked(broker, 1)
    assert headers_of(message)["x-closeout-reason"] == "conflicting_duplicate"


async def test_a_message_id_that_postgresql_cannot_store_does_not_keep_a_run_from_being_closed_out(
    database_url, amqp_url, engine, broker
):
    event = {"specversion": "1.0", "id": "a\x00\ud800", "data": runs.message()}
    async with worker(database_url, amqp_url):
        await publish(broker, runs.body(), message_id="a\x00b")
        await publish(broker, json.dumps(event).encode())
        await eventually(engine, select(func.count()).select_from(tables.run_completions), 2)
    async with engine.connect() as conn:
        stored = (await conn.execute(select(tables.run_completions.c.message_id))).scalars().all()
    assert (len(stored), "ab" in stored) == (2, True)  # the client gives the other message an id


async def test_an_unknown_content_encoding_is_parked(database_url, amqp_url, broker):
    async with worker(database_url, amqp_url):
        await publish(broker, runs.body(), content_encoding="br")
        (message,) = await parked(broker, 1)
    assert headers_of(message)["x-closeout-reason"] == "unsupported_content_type"


async def test_a_message_of_an_untrusted_publisher_is_parked(
    database_url, amqp_url, bare_amqp_url, rabbit, engine, broker
):
    vhost = bare_amqp_url.rsplit("/", 1)[1]
    runner = BrokerConnection(rabbit.add_user(f"runner-{vhost}", "pw", "^$", ".*", ".*", vhost), name="runner")
    async with worker(database_url, amqp_url, TRUSTED_PUBLISHERS=f"runner-{vhost}"):
        await publish(runner, runs.body(), user_id=f"runner-{vhost}")
        await publish(runner, runs.body())
        (message,) = await parked(broker, 1)
        await eventually(engine, published_runs(), 1)
    assert headers_of(message)["x-closeout-reason"] == "untrusted_publisher"
    await runner.close()


async def test_a_run_that_cannot_be_written_does_not_fail_its_batch(database_url, amqp_url, engine, broker):
    bad = runs.message(tenant_id="cursed")
    async with engine.begin() as conn:
        await conn.execute(
            text("ALTER TABLE governance.incidents ADD CONSTRAINT no_curse CHECK (tenant_id <> 'cursed')")
        )
    bodies = [runs.body() for _ in range(40)]
    bodies.insert(20, runs.body(bad))
    await publish(broker, *bodies)
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="1"):
        (message,) = await parked(broker, 1)
        await eventually(engine, published_runs(), 40)
    assert message.body == runs.body(bad)
    headers = headers_of(message)
    assert (headers["x-closeout-reason"], headers["x-closeout-attempts"]) == ("attempts_exhausted", 1)
    assert "no_curse" in headers["x-closeout-error"]


async def test_the_state_of_a_closed_channel_is_released(database_url, amqp_url, engine, broker):
    async with worker(database_url, amqp_url) as service:
        for number in range(1, 5):
            await publish(broker, runs.body())
            await eventually(engine, published_runs(), number)
            await service.worker._consumers._consumers[0]._connection.close()

        def known() -> int:
            gc.collect()
            return len([found for found in gc.get_objects() if isinstance(found, Acks)])

        await until(lambda: known() <= 1, every=0.1)  # the last one's connection may still be closing


@pytest.mark.parametrize("attempt", range(3))
async def test_stopping_under_load_loses_nothing(database_url, amqp_url, engine, broker, attempt):
    await publish(broker, *[runs.body() for _ in range(300)])
    async with worker(database_url, amqp_url):
        await until(lambda: _closed_out(engine), every=0.01)
    done = await _closed_out(engine)
    await length_without_consumers(broker, "closeout.run-completed")  # the worker's deliveries are requeued
    left = {str(runs.run_id_of(m.body)) for m in await emptied(broker, "closeout.run-completed")}
    assert len(done | left) == 300
    assert done & left == set()  # no committed run is redelivered


async def test_a_worker_started_before_migration_and_topology_reports_what_is_missing(
    empty_database_url, bare_amqp_url
):
    async with worker(empty_database_url, bare_amqp_url) as service:

        async def named() -> bool:
            response = await request(service.http.port, "/readyz")
            assert response.status == 503
            return "run closeout migrate" in response.body

        await until(named)
        assert (await request(service.http.port, "/livez")).status == 200


async def test_readyz_reports_ready_and_metrics_are_served_while_consuming(database_url, amqp_url):
    async with worker(database_url, amqp_url) as service:
        await until(lambda: ready(service.http.port))
        metrics = await request(service.http.port, "/metrics")
    assert metrics.status == 200
    assert "closeout_coordinator_enabled 1.0" in metrics.body
    assert "closeout_consumer_paused 0.0" in metrics.body


@pytest.mark.parametrize("kept_back", [True, False])
async def test_an_unroutable_event_counts_as_published_unless_subscribers_are_required(
    database_url, amqp_url, engine, broker, kept_back
):
    async with worker(database_url, amqp_url, REQUIRE_EVENT_SUBSCRIBERS=str(kept_back).lower()) as service:
        await publish(broker, runs.body())
        phase = select(tables.run_completions.c.phase)
        await eventually(engine, phase, "COMMITTED" if kept_back else "EVENTS_PUBLISHED")
        await until(lambda: _value(service, "closeout_events_unroutable_total", type="run.finalized") >= 1)
    await eventually(engine, phase, "COMMITTED" if kept_back else "EVENTS_PUBLISHED")  # and stays so


async def test_a_redelivery_publishes_the_events_left_by_a_crash_after_the_commit(
    database_url, amqp_url, engine, broker
):
    body = runs.body()
    run, digest, *_ = decode(body, max_bytes=10**6)
    await create_transaction_coordinator(engine=engine).execute(Arrival.of(run)._replace(digest=digest))
    async with engine.connect() as conn:
        ids = {str(i) for i in (await conn.execute(select(tables.outbox_events.c.event_id))).scalars()}
    events = await listen(broker)
    async with worker(database_url, amqp_url):
        await publish(broker, body)
        await eventually(engine, published_runs(), 1)
    assert {e.header.properties.message_id for e in await received(events, 3)} == ids


async def _closed_out(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as conn:
        return {str(run_id) for run_id in (await conn.execute(select(tables.run_completions.c.run_id))).scalars()}


def _value(service: Service, name: str, **labels: str) -> float:
    return service.worker._settler._metrics.registry.get_sample_value(name, labels) or 0.0
