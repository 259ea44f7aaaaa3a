"""The relay and the publisher on both real servers."""

import asyncio

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.metrics import Metrics
from consumer.outbox.backlog import read_backlog
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from consumer.outbox.store import stale_runs, unpublished
from domains import tables
from domains.run import RunKey
from tests.support import run_messages as runs
from tests.support.broken_writes import count
from tests.support.traffic import listen, published_runs, received


def relay(engine: AsyncEngine, broker: BrokerConnection, *, grace: float = 0.0, required: bool = False) -> Relay:
    metrics = Metrics()
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=metrics, require_subscribers=required)
    return Relay(engine=engine, publisher=publisher, metrics=metrics, grace_seconds=grace)


async def commit_without_publishing(engine: AsyncEngine, number: int) -> list[str]:
    """Commit runs without publishing their events; return their event ids in order."""
    await create_transaction_coordinator(engine=engine).execute_many([runs.run() for _ in range(number)])
    async with engine.connect() as conn:
        ids = await conn.execute(
            select(tables.outbox_events.c.event_id).order_by(
                tables.outbox_events.c.run_id, tables.outbox_events.c.sequence
            )
        )
        return [str(i) for i in ids.scalars()]


async def test_the_relay_publishes_a_dead_workers_events_with_their_ids_and_in_order(engine, broker):
    ids = await commit_without_publishing(engine, 50)
    events = await listen(broker)

    assert await relay(engine, broker).sweep() == 50

    await received(events, len(ids))
    assert sorted(str(e.header.properties.message_id) for e in events) == sorted(ids)
    order = {event_id: position % 3 for position, event_id in enumerate(ids)}
    for run_id in {e.header.properties.correlation_id for e in events}:
        mine = [e.header.properties for e in events if e.header.properties.correlation_id == run_id]
        assert [order[str(properties.message_id)] for properties in mine] == [0, 1, 2]
    assert await count(engine, "outbox_events") == 0
    async with engine.connect() as conn:
        assert (await conn.execute(published_runs())).scalar_one() == 50


async def test_the_relay_leaves_events_younger_than_the_grace_period_to_their_worker(engine, broker):
    await commit_without_publishing(engine, 1)

    assert await relay(engine, broker, grace=60).sweep() == 0
    assert await count(engine, "outbox_events") == 3


async def test_concurrent_relays_publish_every_event_exactly_once(engine, broker, bare_amqp_url):
    ids = await commit_without_publishing(engine, 600)
    events = await listen(broker)
    others = [BrokerConnection(bare_amqp_url, name=f"relay {n}") for n in range(3)]

    sweeps = await asyncio.gather(*(relay(engine, other).sweep() for other in others))

    await received(events, len(ids))
    assert sweeps == [200, 200, 200]
    assert sorted(str(e.header.properties.message_id) for e in events) == sorted(ids)
    for other in others:
        await other.close()


async def test_unroutable_events_do_not_delay_later_ones(engine, broker):
    await commit_without_publishing(engine, 250)
    sweeper = relay(engine, broker, required=True)
    with pytest.raises(Exception, match="no queue is bound"):
        await sweeper.sweep()
    await listen(broker)

    assert await sweeper.sweep() == 50  # after the first 200
    assert await sweeper.sweep() == 200  # and from the start again
    async with engine.connect() as conn:
        assert (await conn.execute(select(func.count()).select_from(tables.outbox_events))).scalar_one() == 0


async def test_events_after_a_failed_one_of_the_same_run_are_published_again_after_it(engine, broker):
    """Only the last event has a binding: with subscribers required, the first two fail, so the third is kept, too."""
    await commit_without_publishing(engine, 1)
    channel = await broker.channel(confirms=False)
    queue = (await channel.queue_declare("", exclusive=True)).queue
    await channel.queue_bind(queue, "governance.events", routing_key="run.finalized.#")

    with pytest.raises(Exception, match=r"incident\.created\.high"):
        await relay(engine, broker, required=True).sweep()

    assert await count(engine, "outbox_events") == 3


async def test_a_relay_without_a_broker_keeps_every_event_and_logs_it(engine):
    await commit_without_publishing(engine, 1)
    nowhere = BrokerConnection("amqp://u:p@127.0.0.1:1/", name="nowhere")

    with pytest.raises(Exception, match="RabbitMQ is not available"):
        await relay(engine, nowhere).sweep()

    assert await count(engine, "outbox_events") == 3


async def _edit_last_event(engine: AsyncEngine, change: str, *, number: int = 1) -> None:
    """Change the last event of *number* runs behind the product's back, past the table's check."""
    async with engine.begin() as conn:
        await conn.execute(text("ALTER TABLE governance.outbox_events DROP CONSTRAINT IF EXISTS publishable"))
        await conn.execute(
            text(
                f"UPDATE governance.outbox_events SET {change} WHERE sequence = 3 AND run_id IN "
                f"(SELECT run_id FROM governance.outbox_events WHERE sequence = 3 ORDER BY created_at LIMIT {number})"
            )
        )


async def _reasons(engine: AsyncEngine) -> dict[str, int]:
    async with engine.connect() as conn:
        return (await read_backlog(conn)).set_aside


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("body = '{\"id\": '", "event 3: body is not a CloudEvent in JSON"),
        ("body = '[]'", "event 3: body is not a CloudEvent in JSON"),
        ("body = ''", "event 3: body is not a CloudEvent in JSON"),
        ("routing_key = repeat('é', 128)", "event 3: routing_key has 256 bytes; AMQP allows 255"),
        ("type = repeat('t', 300)", "event 3: type has 300 bytes; AMQP allows 255"),
        ("body = '{' || repeat(' ', 17000000) || '}'", "event 3: body has 17,000,002 bytes; at most 16,777,216"),
    ],
)
async def test_a_row_that_no_message_can_hold_is_set_aside_and_all_others_are_published(engine, broker, change, reason):
    await commit_without_publishing(engine, 20)
    await _edit_last_event(engine, change)
    events = await listen(broker)
    sweeper = relay(engine, broker)

    await sweeper.sweep()

    assert len(await received(events, 57)) == 57
    assert await count(engine, "outbox_events") == 3
    (found,) = await _reasons(engine)
    assert found.startswith(reason)
    assert await sweeper.sweep() == 0  # it is not read again until its time


async def test_an_event_above_the_brokers_limit_is_set_aside_and_all_others_are_published(engine, broker, rabbit):
    await commit_without_publishing(engine, 60)
    await _edit_last_event(engine, "body = '{' || repeat(' ', 3000000) || '}'", number=2)
    events = await listen(broker)
    before = await asyncio.to_thread(rabbit.eval, "application:get_env(rabbit, max_message_size)")
    await asyncio.to_thread(rabbit.eval, "persistent_term:put(max_message_size, 1000000)")
    try:
        await relay(engine, broker).sweep()
    finally:
        await asyncio.to_thread(rabbit.eval, f"persistent_term:put(max_message_size, element(2, {before}))")

    await received(events, 174)
    (reason,) = await _reasons(engine)
    assert "message size" in reason
    assert (await _reasons(engine))[reason] == 2


async def test_the_check_refuses_a_row_that_no_message_can_hold(engine):
    await commit_without_publishing(engine, 1)

    for change in ("body = '[]'", "routing_key = repeat('k', 256)", "type = repeat('t', 256)"):
        with pytest.raises(IntegrityError, match="publishable"):
            async with engine.begin() as conn:
                await conn.execute(text(f"UPDATE governance.outbox_events SET {change}"))


async def test_huge_rows_are_read_in_parts(engine, broker):
    await commit_without_publishing(engine, 8)
    await _edit_last_event(engine, "body = '{' || repeat(' ', 13000000) || '}'", number=8)
    async with engine.connect() as conn:
        keys = [RunKey(row.tenant_id, row.run_id) for row in await conn.execute(stale_runs(0, 8))]
        found = await unpublished(conn, keys)
    assert sum(len(event.body) for event in found.events) <= 64 * 1024 * 1024
    assert found.unreadable == {}
    events = await listen(broker)
    sweeper = relay(engine, broker)

    while await sweeper.sweep():
        pass

    await received(events, 24)
    assert await count(engine, "outbox_events") == 0
