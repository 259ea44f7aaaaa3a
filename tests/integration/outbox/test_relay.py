"""The relay and the publisher on both real servers."""

import asyncio

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from domains import tables
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
