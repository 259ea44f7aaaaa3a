"""A subscriber: urgent incidents and how every run ended; each event takes effect once, whatever crashes.

AMQP_URL=amqp://user:password@host/vhost python subscribe.py
"""

import asyncio
import json
import os
import sqlite3
from typing import Any

import aio_pika
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

QUEUE = "subscriber.on-call"
BINDINGS = ("incident.created.high", "incident.created.critical", "run.finalized.*")
TABLES = """
    CREATE TABLE IF NOT EXISTS seen (event_id TEXT PRIMARY KEY, at TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS urgent (run TEXT PRIMARY KEY, severity TEXT NOT NULL, error_code TEXT);
    CREATE TABLE IF NOT EXISTS ended (run TEXT PRIMARY KEY, status TEXT NOT NULL);
"""


def take(store: sqlite3.Connection, event: dict[str, Any]) -> bool:
    """Store *event* and its id in one transaction; return False if the id was stored before."""
    data = event["data"]
    with store:  # BEGIN ... COMMIT; ROLLBACK if anything below raises
        new = store.execute("INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", (event["id"], event["time"]))
        if new.rowcount == 0:
            return False
        if event["type"] == "run.finalized":
            store.execute("INSERT INTO ended VALUES (?, ?)", (event["subject"], data["status"]))
        else:
            row = (event["subject"], data["severity"], data["error_code"])
            store.execute("INSERT INTO urgent VALUES (?, ?, ?)", row)
    return True


async def listen(store: sqlite3.Connection) -> None:
    """Consume events until the connection is lost."""
    async with await aio_pika.connect(os.environ["AMQP_URL"], timeout=10) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        # Durable and replicated: events that arrive while no subscriber runs wait in it.
        queue = await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        for pattern in BINDINGS:
            await queue.bind("governance.events", pattern)
        async with queue.iterator() as messages:
            async for message in messages:
                event = json.loads(message.body)
                new = take(store, event)
                await message.ack()  # after the commit: a redelivery after a crash is found in seen
                print("new " if new else "seen", event["type"], event["subject"], flush=True)


async def main() -> None:
    """Consume, and reconnect when the connection is lost."""
    store = sqlite3.connect(os.environ.get("SUBSCRIBER_DB", "subscriber.db"))
    store.executescript(TABLES)
    while True:
        try:
            await listen(store)
        except CONNECTION_EXCEPTIONS as error:
            print(f"RabbitMQ: {error!r}", flush=True)
        await asyncio.sleep(2)


asyncio.run(main())
