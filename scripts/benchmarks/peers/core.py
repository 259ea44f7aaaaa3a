"""aio-pika and SQLAlchemy Core: one transaction per message, AT_ONCE messages concurrently."""

import asyncio
import os

import aio_pika
import uvloop
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage

from benchmarks.peers import storing
from benchmarks.peers.work import AT_ONCE, CONTENT_TYPE, EXCHANGE, QUEUE, Rows, rows_for
from consumer.contract.events import OutboxEvent


async def main() -> None:
    """Consume until killed."""
    engine = storing.engine_of_peer()
    book = await storing.read_policies(engine)
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    publishing = await connection.channel()  # in confirm mode by default
    exchange = await publishing.get_exchange(EXCHANGE, ensure=False)
    consuming = await connection.channel()
    await consuming.set_qos(prefetch_count=AT_ONCE)
    queue = await consuming.get_queue(QUEUE, ensure=False)

    async def on_message(message: AbstractIncomingMessage) -> None:
        async with message.process():
            rows = rows_for(message.body, book)
            async with engine.begin() as conn:
                new = await storing.write(conn, rows)
            if new:
                await publish(exchange, rows)
                async with engine.begin() as conn:
                    await storing.mark(conn, rows.key)

    await queue.consume(on_message)
    await asyncio.Future()


async def publish(exchange: AbstractExchange, rows: Rows) -> None:
    """Publish a run's events in order, and wait for their confirms together."""
    await asyncio.gather(*(exchange.publish(_message(event), event.routing_key) for event in rows.events))


def _message(event: OutboxEvent) -> aio_pika.Message:
    return aio_pika.Message(
        event.body.encode(),
        content_type=CONTENT_TYPE,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        correlation_id=str(event.run_id),
        message_id=str(event.event_id),
        type=event.type,
    )


if __name__ == "__main__":
    uvloop.run(main())
