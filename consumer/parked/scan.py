"""Scans the parked queue: every message is visited once, in order, and none is lost.

A quorum queue cannot be read without consuming. A scan therefore takes every message present at its start, unacked, on
one channel. It acks the messages to remove and requeues the others in order. If the process ends, the broker requeues
what was not acked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import NamedTuple

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import AMQPChannelError

from consumer.amqp.channel import not_cancelled
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.named_run import named_run
from consumer.contract.names import ERROR_HEADER, PARKED_AT_HEADER, PARKED_QUEUE, REASON_HEADER
from consumer.errors import UnavailableError, one_line
from consumer.parked.copies import attempts_of, headers_of
from consumer.wording import Progress

# Messages held in memory at once: 32 MiB if each has the default MESSAGE_MAX_BYTES.
_BATCH = 32
# Seconds for the broker's counts to include requeued messages and departed consumers; it takes milliseconds.
_COUNTS_SETTLE_SECONDS = 10.0
# Bytes of a body that is searched for tenant and run; a larger body was parked as too large.
_SEARCHED_BYTES = 16 * 1024 * 1024


class Parked(NamedTuple):
    """One parked message without its body; unreadable fields are ``None``."""

    position: int
    parked_at: datetime | None
    reason: str | None
    tenant_id: str | None
    run_id: str | None
    message_id: str | None
    attempts: int
    size: int
    error: str
    fingerprint: bytes


@dataclass(slots=True)
class Scan:
    """The progress of a scan, and the reason if it ended early."""

    visited: int = 0
    expected: int = 0
    failure: str | None = None


Held = tuple[Parked, DeliveredMessage]
Visit = Callable[[Sequence[Held]], Awaitable[Sequence[DeliveredMessage]]]


async def scan(connection: BrokerConnection, visit: Visit, report: Scan, progress: Progress | None = None) -> None:
    """Pass each message to *visit* once, in order and in batches; ack those it returns and requeue the rest in order.

    Raises :class:`UnavailableError` if nothing could be read; a later failure is in *report*.
    """
    channel = await connection.channel(confirms=False)
    requeued: list[int] = []  # the last tag of each batch that stays
    kept = 0
    try:
        with not_cancelled():
            report.expected = await _ready(channel)
            while report.visited < report.expected:
                batch = await _take(channel, report.visited, min(_BATCH, report.expected - report.visited))
                if not batch:
                    break
                removed = {m.delivery_tag for m in await visit([(_parked(m, position), m) for position, m in batch])}
                for tag in removed:
                    await channel.basic_ack(tag or 0, wait=False)
                if stays := [m.delivery_tag or 0 for _, m in batch if m.delivery_tag not in removed]:
                    requeued.append(stays[-1])
                    kept += len(stays)
                report.visited += len(batch)
                if progress is not None:
                    progress(report.visited, report.expected)
            for tag in requeued:
                await channel.basic_nack(tag, multiple=True, requeue=True)
            await _until_ready(channel, kept)
    except (*BROKER_ERRORS, UnavailableError) as error:
        _interrupted(report, one_line(error), error)
    finally:
        with suppress(*BROKER_ERRORS):
            await channel.close()


def _interrupted(report: Scan, why: str, error: BaseException) -> None:
    report.failure = report.failure or f"RabbitMQ: {why}"
    if not report.visited:
        raise UnavailableError(report.failure) from error


async def _ready(channel: AmqpChannel) -> int:
    """Return the queue's length once it has no other consumer, which would hide messages from this scan."""
    async with asyncio.timeout(_COUNTS_SETTLE_SECONDS + 10):
        for _ in range(int(_COUNTS_SETTLE_SECONDS * 20)):
            try:
                declared = await channel.queue_declare(PARKED_QUEUE, passive=True)
            except AMQPChannelError as error:
                raise UnavailableError(f"{one_line(error)}; run closeout topology") from error
            if not declared.consumer_count:
                return declared.message_count or 0
            await asyncio.sleep(0.05)
    raise UnavailableError(f"another consumer is reading {PARKED_QUEUE}; try again when it has finished")


async def _until_ready(channel: AmqpChannel, expected: int) -> None:
    """Wait until requeued messages are counted, so that the next scan starts with all of them."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_COUNTS_SETTLE_SECONDS):
            while ((await channel.queue_declare(PARKED_QUEUE, passive=True)).message_count or 0) < expected:
                await asyncio.sleep(0.02)


async def _take(channel: AmqpChannel, seen: int, number: int) -> list[tuple[int, DeliveredMessage]]:
    """Take the next *number* messages, unacked; fewer if the queue has no more.

    The prefetch count bounds memory; basic.get would need a round trip per message.
    """
    came: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
    await channel.basic_qos(prefetch_count=number)
    tag = (await channel.basic_consume(PARKED_QUEUE, came.put, consumer_tag=f"closeout-parked-{seen:09}")).consumer_tag
    batch: list[DeliveredMessage] = []
    while len(batch) < number:
        try:
            async with asyncio.timeout(1):
                batch.append(await came.get())
        except TimeoutError:
            if not (await channel.queue_declare(PARKED_QUEUE, passive=True)).message_count and came.empty():
                break
    await channel.basic_cancel(tag or "")
    batch.extend(came.get_nowait() for _ in range(came.qsize()))
    batch.sort(key=lambda message: message.delivery_tag or 0)
    return list(enumerate(batch, start=seen + 1))


def _parked(message: DeliveredMessage, position: int) -> Parked:
    headers, properties = headers_of(message), message.header.properties
    tenant, run = named_run(message.body, content_encoding=properties.content_encoding, max_bytes=_SEARCHED_BYTES)
    deaths = headers.get("x-death")
    death = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    at = _parse_time(headers.get(PARKED_AT_HEADER) or death.get("time"))
    error = headers.get(ERROR_HEADER)
    if error is None and REASON_HEADER not in headers:
        error = f"dead-lettered by RabbitMQ: {death.get('reason', 'no reason given')}"
    reason = headers.get(REASON_HEADER)
    unique = blake2b(f"{headers.get(PARKED_AT_HEADER)} {reason} {properties.message_id}\n".encode(errors="replace"))
    unique.update(message.body)
    return Parked(
        position=position, parked_at=at, reason=reason if isinstance(reason, str) else None,
        tenant_id=tenant, run_id=run, message_id=properties.message_id, attempts=attempts_of(message),
        size=len(message.body), error=str(error), fingerprint=unique.digest()[:16],
    )  # fmt: skip


def _parse_time(value: object) -> datetime | None:
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)
