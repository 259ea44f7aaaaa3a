"""The limit of aio-pika: messages per second that it consumes, acks and turns into three events."""

import asyncio
import json
import os
import subprocess

from servers.process import ServerError

from benchmarks.arena import Arena
from benchmarks.messages import bodies, fill
from benchmarks.race import DEADLINE_SECONDS, WARM_UP
from benchmarks.subjects import PYTHON

MESSAGES = 6_000
EVENT_BYTES = 600  # the average of Closeout's events


def rate(arena: Arena, seed: int) -> float:
    """Return messages per second, without the warm-up."""
    arena.empty()
    asyncio.run(fill(arena.environment["AMQP_URL"], bodies(MESSAGES, seed)))
    done = subprocess.run(
        [PYTHON, "-m", "benchmarks.peers.floor"],
        env={**os.environ, **arena.environment, "FLOOR_MESSAGES": str(MESSAGES), "FLOOR_BODY": "x" * EVENT_BYTES},
        capture_output=True, text=True, check=False, timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise ServerError(f"the aio-pika benchmark failed: {done.stderr}")
    acked: list[float] = json.loads(done.stdout)[int(MESSAGES * WARM_UP) :]
    return (len(acked) - 1) / (acked[-1] - acked[0])
