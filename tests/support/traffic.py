"""Messages, rows and events: access to a worker and its servers from outside."""

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
from tests.support.waiting import PATIENCE, until


@asynccontextmanager
async def worker(
    database_url: str, amqp_url: str, spans: Spans | None = None, /, **environ: str
) -> AsyncIterator[Service]:
    """Run a worker; URLs of an administrator are replaced with those of the worker's role and user."""
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
        await asyncio.wait_for(running, PATIENCE)


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
    """Subscribe to all events; the returned list grows as they arrive."""
    channel = await broker.channel(confirms=False)
    queue = (await channel.queue_declare("", exclusive=True)).queue or ""
    await channel.queue_bind(queue, EVENTS_EXCHANGE, routing_key="#")
    events: list[DeliveredMessage] = []

    async def on_event(message: DeliveredMessage) -> None:
        events.append(message)

    await channel.basic_consume(queue, on_event, no_ack=True)
    return events


async def received(events: list[DeliveredMessage], number: int) -> list[DeliveredMessage]:
    """Wait for *number* events and return them: a confirmed event may not have arrived yet."""
    await until(lambda: len(events) >= number, what=f"{number} events")
    return events


async def parked(broker: BrokerConnection, at_least: int, *, queue: str = PARKED_QUEUE) -> list[DeliveredMessage]:
    channel = await broker.channel(confirms=False)
    found: list[DeliveredMessage] = []

    async def enough() -> bool:
        while len(found) < at_least and (message := await channel.basic_get(queue, no_ack=True)).delivery_tag:
            found.append(message)
        return len(found) >= at_least

    await until(enough, what=f"{at_least} messages in {queue}")
    return found


async def eventually(engine: AsyncEngine, statement: Any, expected: object, *, within: float = PATIENCE) -> None:

    async def as_expected() -> bool:
        async with engine.connect() as conn:
            return bool((await conn.execute(statement)).scalar_one_or_none() == expected)

    await until(as_expected, within=within, what=f"{expected!r} as the result of {statement}")


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


async def queue_length(broker: BrokerConnection, queue: str) -> int:
    channel = await broker.channel(confirms=False)
    count = (await channel.queue_declare(queue, passive=True)).message_count or 0
    await channel.close()
    return count


async def has_length(broker: BrokerConnection, queue: str, number: int) -> bool:
    return await queue_length(broker, queue) == number


async def length_without_consumers(broker: BrokerConnection, queue: str) -> int:
    """Wait until *queue* has no consumer, when it contains all unacked messages again, and return its length."""
    channel = await broker.channel(confirms=False)

    async def left() -> bool:
        return not (await channel.queue_declare(queue, passive=True)).consumer_count

    await until(left, what=f"no consumer of {queue}")
    await channel.close()
    return await queue_length(broker, queue)
