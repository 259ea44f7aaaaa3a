"""aio-pika's own floor in the arena: how many messages a second it can consume, answer with three events, and ack."""

import asyncio
import json
import os
import subprocess

from servers.process import ServerError

from benchmarks.arena import Arena
from benchmarks.messages import bodies, fill
from benchmarks.race import PATIENCE, WARM_UP
from benchmarks.subjects import PYTHON

MESSAGES = 6_000
# Bytes of an event, as Closeout's are on average.
EVENT_BYTES = 600


def rate(arena: Arena, seed: int) -> float:
    """Return messages a second, without the warm-up."""
    arena.empty()
    asyncio.run(fill(arena.environment["AMQP_URL"], bodies(MESSAGES, seed)))
    done = subprocess.run(
        [PYTHON, "-m", "benchmarks.peers.floor"],
        env={**os.environ, **arena.environment, "FLOOR_MESSAGES": str(MESSAGES), "FLOOR_BODY": "x" * EVENT_BYTES},
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    if done.returncode:
        raise ServerError(f"the floor failed: {done.stderr}")
    acked: list[float] = json.loads(done.stdout)[int(MESSAGES * WARM_UP) :]
    return (len(acked) - 1) / (acked[-1] - acked[0])
