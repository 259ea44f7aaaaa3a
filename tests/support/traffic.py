"""Messages in, rows and events out: what tests do to a worker and its servers from outside."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiormq import spec
from aiormq.abc import DeliveredMessage
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import load_settings
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.assembly import Service, build_service
from consumer.contract.names import EVENTS_EXCHANGE, PARKED_QUEUE, RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.tracing.spans import Spans
from domains import tables
from tests.support.roles import WORKER, WORKER_USER, as_role, as_user

# Seconds. A message that is tried again is back after ten; all else takes less than one on a machine that is not busy.
PATIENCE = 30.0


@asynccontextmanager
async def worker(
    database_url: str, amqp_url: str, spans: Spans | None = None, /, **environ: str
) -> AsyncIterator[Service]:
    """Run a worker, as the role and the user that are a worker's where the URLs are an administrator's."""
    settings = load_settings(
        {
            "DATABASE_URL": as_role(database_url, WORKER),
            "AMQP_URL": as_user(amqp_url, WORKER_USER),
            "HTTP_PORT": "0",
            "HTTP_HOST": "127.0.0.1",
            "TRANSACTION_COORDINATOR_ENABLED": "true",
            **environ,
        }
    )
    service = build_service(settings, spans=spans)
    running = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        service.worker.stop()
        await asyncio.wait_for(running, 30)


async def publish(broker: BrokerConnection, *bodies: bytes, **properties: Any) -> None:
    channel = ConfirmedChannel(broker)
    for body in bodies:
        await channel.send(
            exchange=RUNS_EXCHANGE,
            routing_key=RUN_COMPLETED_KEY,
            body=body,
            properties=spec.Basic.Properties(**{"content_type": "application/json", "delivery_mode": 2, **properties}),
        )


async def listen(broker: BrokerConnection) -> list[DeliveredMessage]:
    """Subscribe to all events; the list grows as they come."""
    channel = await broker.channel(confirms=False)
    queue = (await channel.queue_declare("", exclusive=True)).queue or ""
    await channel.queue_bind(queue, EVENTS_EXCHANGE, routing_key="#")
    events: list[DeliveredMessage] = []

    async def on_event(message: DeliveredMessage) -> None:
        events.append(message)

    await channel.basic_consume(queue, on_event, no_ack=True)
    return events


async def received(events: list[DeliveredMessage], number: int) -> list[DeliveredMessage]:
    """Wait until so many have come, and return them: what the broker confirmed may still be on its way to us."""
    async with asyncio.timeout(PATIENCE):
        while len(events) < number:
            await asyncio.sleep(0.01)
    return events


async def parked(broker: BrokerConnection, at_least: int, *, queue: str = PARKED_QUEUE) -> list[DeliveredMessage]:
    channel = await broker.channel(confirms=False)
    found: list[DeliveredMessage] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < at_least:
            message = await channel.basic_get(queue, no_ack=True)
            if message.delivery_tag is None:
                await asyncio.sleep(0.02)
            else:
                found.append(message)
    return found


async def eventually(engine: AsyncEngine, statement: Any, expected: object, *, within: float = PATIENCE) -> None:
    found: object = None
    async with asyncio.timeout(within):
        while found != expected:
            async with engine.connect() as conn:
                found = (await conn.execute(statement)).scalar_one_or_none()
            if found != expected:
                await asyncio.sleep(0.02)


def published_runs() -> Any:
    return (
        select(func.count())
        .select_from(tables.run_completions)
        .where(tables.run_completions.c.phase == "EVENTS_PUBLISHED")
    )


async def emptied(broker: BrokerConnection, queue: str) -> list[DeliveredMessage]:
    channel = await broker.channel(confirms=False)
    found: list[DeliveredMessage] = []
    while (message := await channel.basic_get(queue, no_ack=True)).delivery_tag is not None:
        found.append(message)
    return found
