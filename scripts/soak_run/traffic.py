"""A publisher that resends until each message is confirmed, and a subscriber that records every event id."""

import asyncio
import json
import random
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from aiormq import spec
from aiormq.abc import DeliveredMessage
from demo_run.runs import realistic_runs

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.names import EVENTS_EXCHANGE, RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.errors import UnavailableError

EVENTS_QUEUE = "soak.events"
CHUNK = 100
WINDOW = 200
DUPLICATES = 0.02
PAUSE_SECONDS = 0.3
# The publisher reconnects after failures over FAILING_SECONDS with no gap longer than FAILING_GAP_SECONDS.
FAILING_SECONDS, FAILING_GAP_SECONDS = 3.0, 2.0
EVENTS_PREFETCH = 500
SLOT = {"incident.created": 0, "incident.suppressed": 0, "policy.evaluated": 1, "run.finalized": 2}


@dataclass(slots=True)
class Publishing:
    """The published runs, by tenant/run."""

    runs: dict[str, bool] = field(default_factory=dict)  # confirmed?
    duplicates: int = 0
    resent: int = 0


@dataclass(slots=True)
class Subscriber:
    """The received events: the ids of each run's three events, and the faults found."""

    ids: dict[str, list[str | None]] = field(default_factory=dict)
    deliveries: int = 0
    repeated: int = 0
    complete: int = 0
    out_of_order: int = 0
    returned_late: int = 0
    faults: list[str] = field(default_factory=list)

    def on_event(self, message: DeliveredMessage) -> None:
        """Record one delivery."""
        self.deliveries += 1
        event = json.loads(message.body)
        slot, run = SLOT[event["type"]], event["subject"]
        seen = self.ids.setdefault(run, [None, None, None])
        if seen[slot] == event["id"]:
            self.repeated += 1
        elif seen[slot] is not None:
            self.faults.append(f"{run}: {event['type']} has the ids {seen[slot]} and {event['id']}")
        else:
            if any(later is not None for later in seen[slot + 1 :]):
                # After a kill the broker delivers new messages first and redelivers unacked ones later; the
                # publisher's order was right.
                self.returned_late += bool(message.redelivered)
                self.out_of_order += not message.redelivered
            seen[slot] = event["id"]
            self.complete += None not in seen


async def publish(url: str, seed: int, rate: float, stopping: asyncio.Event, done: Publishing) -> None:
    """Publish *rate* generated runs per second until *stopping*; resend until confirmed, and repeat some runs."""
    publisher = _Connection(url)
    source = random.Random(seed + 1)  # noqa: S311 - repeatable
    window = asyncio.Semaphore(WINDOW)
    recent: deque[bytes] = deque(maxlen=1_000)
    loop, number = asyncio.get_running_loop(), 0
    due = loop.time()

    async def send(body: bytes, run: str) -> None:
        try:
            while True:
                channel = publisher.channel
                try:
                    await channel.send(
                        exchange=RUNS_EXCHANGE,
                        routing_key=RUN_COMPLETED_KEY,
                        body=body,
                        properties=spec.Basic.Properties(content_type="application/json", delivery_mode=2),
                    )
                except (UnavailableError, RuntimeError, *BROKER_ERRORS):  # no confirm, whatever the error
                    done.resent += 1
                    publisher.on_failure(channel)
                    await asyncio.sleep(PAUSE_SECONDS)
                else:
                    done.runs[run] = True
                    return
        finally:
            window.release()

    try:
        async with asyncio.TaskGroup() as group:
            while not stopping.is_set():
                for body in realistic_runs(CHUNK, seed * 1_000_003 + number):
                    fields = json.loads(body)
                    run = f"{fields['tenant_id']}/{fields['run_id']}"
                    again = source.choice(recent) if recent and source.random() < DUPLICATES else None
                    recent.append(body)
                    done.runs[run] = False
                    await window.acquire()
                    group.create_task(send(body, run))
                    if again is not None:
                        done.duplicates += 1
                        await window.acquire()
                        fields = json.loads(again)
                        group.create_task(send(again, f"{fields['tenant_id']}/{fields['run_id']}"))
                number += 1
                due = max(due + CHUNK / rate, loop.time() - 1)
                await asyncio.sleep(max(0.0, due - loop.time()))
    finally:
        await publisher.close()


class _Connection:
    """The publisher's connection. It is replaced while it keeps failing: the soak does not rely on its reconnects."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connect()

    def _connect(self) -> None:
        self._connection = BrokerConnection(self._url, name="soak publisher")
        self.channel = ConfirmedChannel(self._connection)
        self._failing_since: float | None = None
        self._failed_at = 0.0

    def on_failure(self, channel: ConfirmedChannel) -> None:
        """Record a failure of *channel*; reconnect if failures persist."""
        now = asyncio.get_running_loop().time()
        if channel is not self.channel:
            return
        if self._failing_since is None or now - self._failed_at > FAILING_GAP_SECONDS:
            self._failing_since = now
        self._failed_at = now
        if now - self._failing_since > FAILING_SECONDS:
            self._discarded = asyncio.ensure_future(self._connection.close())
            self._connect()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


async def declare_events_queue(url: str) -> None:
    """Declare the subscriber's durable queue."""
    connection = BrokerConnection(url, name="soak subscriber")
    try:
        channel = await connection.channel(confirms=False)
        await channel.queue_declare(EVENTS_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        await channel.queue_bind(EVENTS_QUEUE, EVENTS_EXCHANGE, routing_key="#")
    finally:
        await connection.close()


async def subscribe(url: str, subscriber: Subscriber) -> None:
    """Consume events, and reconnect after each failure, until cancelled."""
    while True:
        connection = BrokerConnection(url, name="soak subscriber")
        try:
            await _consume(connection, subscriber)
        except (UnavailableError, RuntimeError, *BROKER_ERRORS):
            pass
        finally:
            await connection.close()
        await asyncio.sleep(PAUSE_SECONDS)


async def _consume(connection: BrokerConnection, subscriber: Subscriber) -> None:
    channel = await connection.channel(confirms=False)

    async def on_event(message: DeliveredMessage) -> None:
        subscriber.on_event(message)
        with suppress(*BROKER_ERRORS):
            await channel.basic_ack(message.delivery_tag or 0, wait=False)

    await channel.basic_qos(prefetch_count=EVENTS_PREFETCH, timeout=10)
    await channel.basic_consume(EVENTS_QUEUE, on_event, timeout=10)
    while not channel.is_closed and connection.is_open:
        await asyncio.sleep(0.2)
