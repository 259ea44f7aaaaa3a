"""The outbox gauges: correct while the relay cannot publish, unknown while the database is unavailable."""

import asyncio
import math

import pika
import pytest

from consumer import create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.contract.names import EVENTS_EXCHANGE
from consumer.metrics import Metrics
from consumer.outbox.backlog import watch_pending
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from consumer.postgres.engine import create_engine
from tests.support import run_messages as runs
from tests.support.waiting import until


@pytest.fixture
async def stopping():
    """Ends the tasks of a test."""
    event = asyncio.Event()
    yield event
    event.set()


async def test_the_age_of_the_oldest_event_rises_while_the_relay_cannot_publish(
    engine, broker, bare_amqp_url, metrics, stopping
):
    await create_transaction_coordinator(engine=engine).execute_many([runs.run() for _ in range(7)])
    with pika.BlockingConnection(pika.URLParameters(bare_amqp_url)) as connection:
        connection.channel().exchange_delete(EVENTS_EXCHANGE)
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=metrics)
    relay = Relay(engine=engine, publisher=publisher, metrics=metrics, grace_seconds=0)
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stopping))
        group.create_task(watch_pending(stopping, engine=engine, metrics=metrics, every=0.05))
        await until(lambda: _oldest(metrics) > 1)
        assert metrics.registry.get_sample_value("closeout_outbox_pending") == 7
        stopping.set()


async def test_an_outbox_that_cannot_be_queried_is_reported_as_unknown(postgres, empty_database_url, metrics, stopping):
    """An outdated number would keep an alert firing, or silent."""
    nowhere = create_engine(f"{empty_database_url}_gone", pool_size=1)
    metrics.outbox_oldest.set(130)
    watching = asyncio.create_task(watch_pending(stopping, engine=nowhere, metrics=metrics, every=0.05))
    await until(lambda: math.isnan(_oldest(metrics)))
    stopping.set()
    await watching
    await nowhere.dispose()


def _oldest(metrics: Metrics) -> float:
    value = metrics.registry.get_sample_value("closeout_outbox_oldest_seconds")
    assert value is not None
    return value
