"""Generated traffic for the screenshots: a wave, a burst, invalid messages and runs that cannot be written."""

import asyncio
import json
import math
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from aiormq import spec
from demo_run.runs import realistic_runs
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import EVENTS_EXCHANGE, RUN_COMPLETED_KEY, RUNS_EXCHANGE

TICK_SECONDS = 0.25
MEAN_RATE = 45  # runs per second; the rate follows a sine wave
WAVE_SECONDS = 55.0
BURST = 1_200  # runs published at once
BROKEN = (
    b"{this is not JSON",
    b'{"schema_version": 7}',
    b'{"schema_version": 1, "tenant_id": "no spaces allowed"}',
)
# A database constraint rejects runs of this agent.
REJECTED_AGENT = "agent-7"
EVENTS_QUEUE = "screenshots.events"
STEPS = (
    ("plan", "succeeded", 840, 0.0021),
    ("search", "succeeded", 2_310, 0.0048),
    ("read_page", "succeeded", 5_120, 0.0132),
    ("read_page", "succeeded", 3_470, 0.0098),
    ("query_database", "succeeded", 960, 0.0017),
    ("summarize", "succeeded", 7_850, 0.4402),
    ("write_file", "skipped", 0, None),
    ("run_tests", "failed", 14_200, 0.0895),
)


class Traffic:
    """A publisher, and a queue that receives the events."""

    def __init__(self, broker: BrokerConnection, engine: AsyncEngine, seed: int) -> None:
        self._broker = broker
        self._engine = engine
        self._channel = ConfirmedChannel(broker)
        self._source = random.Random(seed)  # noqa: S311 - for variety, not for secrets
        self._seed = seed

    async def prepare(self) -> None:
        """Declare a queue for the events, and add the constraint that rejects one agent."""
        channel = await self._broker.channel(confirms=False)
        await channel.queue_declare(EVENTS_QUEUE, arguments={"x-max-length": 1_000})
        await channel.queue_bind(EVENTS_QUEUE, EVENTS_EXCHANGE, routing_key="#")
        async with self._engine.begin() as conn:
            constraint = f"CHECK (agent_id <> '{REJECTED_AGENT}')"
            await conn.execute(text(f"ALTER TABLE governance.incidents ADD CONSTRAINT rejected_agent {constraint}"))

    async def publish(self, seconds: float) -> None:
        """Publish for *seconds*."""
        ticks = math.ceil(seconds / TICK_SECONDS)
        started = time.monotonic()
        for tick in range(ticks):
            at = tick * TICK_SECONDS
            rate = MEAN_RATE * (1 + 0.6 * math.sin(2 * math.pi * at / WAVE_SECONDS)) * self._source.uniform(0.8, 1.2)
            bodies = realistic_runs(round(rate * TICK_SECONDS), self._seed + tick)
            if tick == ticks * 2 // 3:
                bodies += realistic_runs(BURST, self._seed - 1)
            bodies = [body for body in bodies if json.loads(body)["agent_id"] != REJECTED_AGENT]
            bodies += self._faulty(bodies[0], tick)
            await asyncio.gather(*map(self._send, bodies))
            await asyncio.sleep(max(0.0, started + at + TICK_SECONDS - time.monotonic()))

    async def publish_detailed_run(self) -> dict[str, Any]:
        """Publish a run that fills every section of its page, and return it."""
        run = _detailed_run(self._source)
        await self._send(json.dumps(run).encode())
        return run

    def _faulty(self, body: bytes, tick: int) -> Iterator[bytes]:
        """Yield invalid, repeated, conflicting and rejected messages at fixed ticks."""
        if tick % 100 == 33:
            yield self._source.choice(BROKEN)
        if tick % 90 == 50:
            yield body  # a runner that lost a confirm publishes again
        if tick % 160 == 80:
            yield json.dumps({**json.loads(body), "model": "another"}).encode()
        if tick % 160 == 60:
            yield json.dumps({**_detailed_run(self._source), "agent_id": REJECTED_AGENT}).encode()

    async def _send(self, body: bytes) -> None:
        properties = spec.Basic.Properties(content_type="application/json", delivery_mode=2)
        await self._channel.send(
            exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=body, properties=properties
        )


def _detailed_run(source: random.Random) -> dict[str, Any]:
    ended = datetime.now(UTC) - timedelta(seconds=0.35)
    return {
        "schema_version": 1,
        "tenant_id": "acme",
        "run_id": str(UUID(int=source.getrandbits(128), version=4)),
        "agent_id": "release-notes",
        "status": "failed",
        "error_code": "AGENT_CRASH",
        "error_message": "run_tests ended with status 137\n  test_export.py::test_large_export was killed after 14.2 s",
        "trace_id": str(UUID(int=source.getrandbits(128), version=4)),
        "started_at": (ended - timedelta(milliseconds=sum(step[2] for step in STEPS))).isoformat(),
        "completed_at": ended.isoformat(),
        "usage": {"cost_usd": 0.5613, "input_tokens": 48_210, "output_tokens": 6_377},
        "model": "claude-sonnet",
        "steps": [
            {
                "index": index,
                "skill": skill,
                "status": status,
                "duration_ms": took,
                "cost_usd": cost,
                "error_code": "SKILL_ERROR" if status == "failed" else None,
            }
            for index, (skill, status, took, cost) in enumerate(STEPS)
        ],
        "metadata": {"region": "eu", "retries": 1, "branch": "release/2.4", "commit": "9f1c2e7"},
    }
