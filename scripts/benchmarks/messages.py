"""Generates run-completed messages of five steps and publishes a backlog of them."""

import asyncio
import json
from collections.abc import Sequence

from aiormq import spec
from demo_run.runs import realistic_runs

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import RUN_COMPLETED_KEY, RUNS_EXCHANGE

STEPS = 5
WINDOW = 500  # unconfirmed messages while a backlog is published

PROPERTIES = spec.Basic.Properties(content_type="application/json", delivery_mode=2)


def bodies(number: int, seed: int, *, tenant: str | None = None) -> list[bytes]:
    """Return *number* messages of five steps each; equal runs for an equal *seed*."""
    made = realistic_runs(number, seed, steps=STEPS)
    if tenant is None:
        return made
    return [json.dumps({**json.loads(body), "tenant_id": tenant}).encode() for body in made]


async def fill(amqp_url: str, messages: Sequence[bytes]) -> None:
    """Publish *messages* and wait for every confirm."""
    connection = BrokerConnection(amqp_url, name="bench fill")
    channel = ConfirmedChannel(connection)
    window = asyncio.Semaphore(WINDOW)

    async def send(body: bytes) -> None:
        async with window:
            await channel.send(exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=body, properties=PROPERTIES)

    await channel.opened()
    await asyncio.gather(*map(send, messages))
    await connection.close()
