"""A runner: publish that a run has completed, and return once RabbitMQ has it on disk.

AMQP_URL=amqp://user:password@host/vhost python publish.py
"""

import asyncio
import json
import os
import uuid
from typing import Any

import aio_pika
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

RUN = {
    "schema_version": 1,
    "tenant_id": "acme",
    "run_id": str(uuid.uuid4()),
    "agent_id": "release-notes",
    "status": "failed",
    "error_code": "EXECUTION_TIMEOUT",
    "error_message": "search did not respond within 30 s",
    "started_at": "2026-11-01T12:00:00Z",
    "completed_at": "2026-11-01T12:00:30Z",
    "usage": {"cost_usd": 0.0125, "input_tokens": 1200, "output_tokens": 200},
    "steps": [{"index": 0, "skill": "search", "status": "failed", "duration_ms": 30000}],
}


async def publish(run: dict[str, Any]) -> None:
    """Publish *run* until RabbitMQ confirms it. Publishing it twice is harmless."""
    message = aio_pika.Message(
        json.dumps(run).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=str(run["run_id"]),  # any text; displayed with the run
        # headers={"traceparent": "00-..."},  a W3C trace context, if there is one
    )
    for wait in (1, 2, 4, 8, 15, 30, 60):
        try:
            # A busy runner keeps the connection and the channel open, and opens new ones only after an error.
            async with await aio_pika.connect(os.environ["AMQP_URL"], timeout=10) as connection:
                # Without on_return_raises an unroutable message would count as confirmed.
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                runs = await channel.get_exchange("runs", ensure=False)
                await runs.publish(message, "run.completed", mandatory=True, timeout=10)
                return
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:  # unavailable, nacked, returned, timed out
            print(f"not confirmed, retrying in {wait} s: {error!r}")
            await asyncio.sleep(wait)
    raise RuntimeError("RabbitMQ is unavailable: keep the message, and publish it later with closeout publish")


asyncio.run(publish(RUN))
print(f"confirmed: {RUN['tenant_id']}/{RUN['run_id']}")
