"""The limit of aio-pika: consume, publish three confirmed messages, ack; no database, no decoding.

It prints the time of each ack, because no database row records it.
"""

import asyncio
import json
import os
import time

import aio_pika
import uvloop
from aio_pika.abc import AbstractIncomingMessage

from benchmarks.peers.work import CONTENT_TYPE, EXCHANGE, QUEUE

PREFETCH = 200
KEYS = ("incident.created.none", "policy.evaluated.no_violation", "run.finalized.succeeded")


async def main() -> None:
    """Consume until every one of FLOOR_MESSAGES was acked."""
    number = int(os.environ["FLOOR_MESSAGES"])
    body = os.environ["FLOOR_BODY"].encode()
    connection = await aio_pika.connect(os.environ["AMQP_URL"])
    publishing = await connection.channel()
    exchange = await publishing.get_exchange(EXCHANGE, ensure=False)
    consuming = await connection.channel()
    await consuming.set_qos(prefetch_count=PREFETCH)
    queue = await consuming.get_queue(QUEUE, ensure=False)
    acked: list[float] = []
    done = asyncio.Event()

    async def on_message(message: AbstractIncomingMessage) -> None:
        await asyncio.gather(
            *(
                exchange.publish(
                    aio_pika.Message(
                        body, content_type=CONTENT_TYPE, delivery_mode=2, message_id=f"{message.message_id}{key}"
                    ),
                    key,
                )
                for key in KEYS
            )
        )
        await message.ack()
        acked.append(time.time())
        if len(acked) == number:
            done.set()

    await queue.consume(on_message)
    await done.wait()
    print(json.dumps(acked))
    await connection.close()


if __name__ == "__main__":
    uvloop.run(main())
