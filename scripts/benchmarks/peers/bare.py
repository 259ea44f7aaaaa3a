"""The lower limit of latency: aio-pika and asyncpg alone, one transaction per message, prepared statements.

It does Closeout's work for one run and has no error handling.
"""

import asyncio
import os

import aio_pika
import asyncpg
import uvloop
from aio_pika.abc import AbstractIncomingMessage
from asyncpg.pool import PoolConnectionProxy

from benchmarks.peers.core import publish
from benchmarks.peers.storing import EVENT
from benchmarks.peers.work import (
    AT_ONCE,
    EXCHANGE,
    QUEUE,
    SELECT_POLICIES,
    Rows,
    json_text,
    policies_in_force,
    rows_for,
)

JSON = ("metadata", "violations", "errors", "steps")


def insert(table: str, row: dict[str, object], conflict: str = "") -> tuple[str, list[object]]:
    """Return an INSERT for *row*, and its values."""
    marks = ", ".join(f"${place}" for place in range(1, len(row) + 1))
    values = [json_text(value) if name in JSON else value for name, value in row.items()]
    return f"INSERT INTO governance.{table} ({', '.join(row)}) VALUES ({marks}){conflict}", values


async def write(conn: PoolConnectionProxy, rows: Rows) -> bool:
    """Write one run's rows in a transaction; return false for a duplicate, and write nothing."""
    async with conn.transaction():
        claim, values = insert("run_completions", rows.completion, " ON CONFLICT DO NOTHING RETURNING run_id")
        if await conn.fetchrow(claim, *values) is None:
            return False
        finding = rows.incident or rows.prevention or {}
        for table, row in (
            ("incidents" if rows.incident else "prevention_records", finding),
            ("policy_evaluations", rows.evaluation),
            ("traces", rows.trace),
        ):
            if row is not None:
                statement, values = insert(table, row)
                await conn.execute(statement, *values)
        events = [getattr(event, name) for event in rows.events for name in EVENT]
        marks = ", ".join(f"({', '.join(f'${place * 7 + n + 1}' for n in range(7))})" for place in range(3))
        await conn.execute(f"INSERT INTO governance.outbox_events ({', '.join(EVENT)}) VALUES {marks}", *events)
    return True


MARK = """
WITH gone AS (DELETE FROM governance.outbox_events WHERE tenant_id = $1 AND run_id = $2)
UPDATE governance.run_completions SET phase = 'EVENTS_PUBLISHED', events_published_at = clock_timestamp()
WHERE tenant_id = $1 AND run_id = $2
"""


async def main() -> None:
    """Consume until killed."""
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=AT_ONCE, max_size=AT_ONCE)
    book = policies_in_force([dict(row) for row in await pool.fetch(str(SELECT_POLICIES))])
    connection = await aio_pika.connect(os.environ["AMQP_URL"])
    publishing = await connection.channel()
    exchange = await publishing.get_exchange(EXCHANGE, ensure=False)
    consuming = await connection.channel()
    await consuming.set_qos(prefetch_count=AT_ONCE)
    queue = await consuming.get_queue(QUEUE, ensure=False)

    async def on_message(message: AbstractIncomingMessage) -> None:
        rows = rows_for(message.body, book)
        async with pool.acquire() as conn:
            new = await write(conn, rows)
            if new:
                await publish(exchange, rows)
                await conn.execute(MARK, *rows.key)
        await message.ack()

    await queue.consume(on_message)
    await asyncio.Future()


if __name__ == "__main__":
    uvloop.run(main())
