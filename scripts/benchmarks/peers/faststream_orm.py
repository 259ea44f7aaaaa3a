"""FastStream and SQLAlchemy's ORM: one transaction per message, AT_ONCE messages concurrently."""

import asyncio
import os

import uvloop
from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitExchange, RabbitQueue
from faststream.rabbit.annotations import RabbitMessage
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.peers import orm, storing
from benchmarks.peers.work import AT_ONCE, CONTENT_TYPE, EXCHANGE, QUEUE, Rows, rows_for
from domains.policies.rules import PolicySet

# A logger would write one line per message; without one FastStream is fastest.
broker = RabbitBroker(os.environ["AMQP_URL"], default_channel=Channel(prefetch_count=AT_ONCE), logger=None)
app = FastStream(broker, logger=None)
engine = storing.engine_of_peer()
sessions = async_sessionmaker(engine, expire_on_commit=False)
exchange = RabbitExchange(EXCHANGE, declare=False)
books: list[PolicySet] = []


@app.on_startup
async def read_policies() -> None:
    """Read the policies once."""
    books.append(await storing.read_policies(engine))


@broker.subscriber(RabbitQueue(QUEUE, declare=False))
async def close_out(message: RabbitMessage) -> None:
    """Close out one run; FastStream acks when this returns."""
    rows = rows_for(message.body, books[0])
    async with sessions.begin() as session:
        new = await session.run_sync(orm.write, rows)
    if new:
        await publish(rows)
        async with sessions.begin() as session:
            for statement in orm.mark_of(rows.key):
                await session.execute(statement)


async def publish(rows: Rows) -> None:
    """Publish a run's events in order, and wait for their confirms together."""
    await asyncio.gather(
        *(
            broker.publish(
                event.body.encode(),
                exchange=exchange,
                routing_key=event.routing_key,
                persist=True,
                content_type=CONTENT_TYPE,
                correlation_id=str(event.run_id),
                message_id=str(event.event_id),
                message_type=event.type,
            )
            for event in rows.events
        )
    )


if __name__ == "__main__":
    uvloop.run(app.run())
