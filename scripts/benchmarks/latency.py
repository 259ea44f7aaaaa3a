"""Latency at low rates: from a run's publish to its commit, and to its last event's confirm."""

import asyncio
import json
import time
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from aiormq import spec

from benchmarks.arena import Arena
from benchmarks.messages import PROPERTIES, bodies
from benchmarks.race import running, until_finished
from benchmarks.subjects import Subject, closeout, peer
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import RUN_COMPLETED_KEY, RUNS_EXCHANGE

SECONDS = 15
WARM_UP_RUNS = 50
SUBJECTS = (closeout(), peer("aio-pika + asyncpg, bare", "bare", runs=0))
RATES = (10, 100)


class Latency(NamedTuple):
    """Milliseconds from a run's publish."""

    commit_p50: float
    commit_p99: float
    confirmed_p50: float
    confirmed_p99: float


def measure(arena: Arena, subject: Subject, rate: int, seed: int, logs: Path) -> Latency:
    """Publish *rate* runs per second to an idle *subject* and return their latencies."""
    arena.empty()
    number = WARM_UP_RUNS + rate * SECONDS
    with running(subject, arena.environment, logs) as processes:
        messages = bodies(number, seed)
        asyncio.run(_publish(arena.environment["AMQP_URL"], messages[:WARM_UP_RUNS], rate))
        until_finished(arena, processes, WARM_UP_RUNS)
        published = asyncio.run(_publish(arena.environment["AMQP_URL"], messages[WARM_UP_RUNS:], rate))
        until_finished(arena, processes, number)
    # The evaluation's row is never updated: its transaction is the run's commit.
    rows = arena.sql(
        "SELECT r.run_id, extract(epoch FROM pg_xact_commit_timestamp(e.xmin)), "
        "extract(epoch FROM events_published_at) "
        "FROM governance.run_completions r JOIN governance.policy_evaluations e USING (tenant_id, run_id)"
    )
    commits, confirms = [], []
    for row in rows:
        run, committed, confirmed = row.split("\t")
        if run in published:
            commits.append(1000 * (float(committed) - published[run]))
            confirms.append(1000 * (float(confirmed) - published[run]))
    return Latency(*_p50_p99(commits), *_p50_p99(confirms))


async def _publish(url: str, messages: list[bytes], rate: int) -> dict[str, float]:
    connection = BrokerConnection(url, name="bench latency")
    channel = ConfirmedChannel(connection)
    published: dict[str, float] = {}
    await channel.opened()
    started = time.monotonic()
    sending = []
    for number, body in enumerate(messages):
        await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
        published[json.loads(body)["run_id"]] = time.time()
        sending.append(asyncio.create_task(_send(channel, body, PROPERTIES)))
    await asyncio.gather(*sending)
    await connection.close()
    return published


async def _send(channel: ConfirmedChannel, body: bytes, properties: spec.Basic.Properties) -> None:
    await channel.send(exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=body, properties=properties)


def _p50_p99(values: list[float]) -> tuple[float, float]:
    percentiles = quantiles(values, n=100)
    return percentiles[49], percentiles[98]
