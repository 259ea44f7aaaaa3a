"""Publishes many messages on a channel in confirm mode with one write, and awaits all confirms together.

aiormq's publish costs a task, two futures, a lock and a wake-up per message; here a batch costs that once. It uses the
same parts of aiormq's channel as that publish does.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from aiormq import spec
from aiormq.abc import ChannelFrame, DeliveredMessage
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.channel import not_cancelled

# The result for one message: the broker's ack, the message itself if it was returned, or an error.
PublishResult = spec.Basic.Ack | DeliveredMessage | BaseException

# Seconds between two checks whether the broker has blocked the connection. Confirms normally arrive in milliseconds; in
# an alarm, waiting for them delays the acks of the batch.
_POLL_SECONDS = 0.25


class _Batch:
    """The results of one batch as they arrive."""

    def __init__(self, channel: AmqpChannel, number: int) -> None:
        self.results: list[PublishResult | None] = [None] * number
        # Created by the channel, which fails it when it closes.
        self.complete = channel.create_future()
        self._missing = number

    def settle(self, position: int, result: PublishResult) -> None:
        self.results[position] = result
        self._missing -= 1
        if not self._missing and not self.complete.done():
            self.complete.set_result(None)


class _Confirm:
    """Replaces aiormq's future for one message's confirm; implements the methods of a future that aiormq calls."""

    __slots__ = ("_batch", "_done", "_position")

    def __init__(self, batch: _Batch, position: int) -> None:
        self._batch, self._position, self._done = batch, position, False

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return False

    def set_result(self, result: PublishResult) -> None:
        if not self._done:
            self._done = True
            self._batch.settle(self._position, result)

    set_exception = set_result


async def publish_batch(
    channel: AmqpChannel,
    messages: Sequence[tuple[str, bytes]],
    *,
    confirm_seconds: float,
    is_blocked: Callable[[], Awaitable[bool]],
) -> Sequence[PublishResult]:
    """Write *messages*, each a message id and its frames, in order, and return a result for each.

    A result is the confirming frame, the message itself if it was unroutable, or an error: the broker's refusal,
    ``TimeoutError`` after *confirm_seconds* or once *is_blocked* returns true, or the error that closed the channel.
    Raises nothing but the caller's own cancellation.
    """
    if not messages:
        return ()
    batch = _Batch(channel, len(messages))
    unconfirmed: BaseException = TimeoutError("not confirmed")
    try:
        with not_cancelled():
            async with asyncio.timeout(confirm_seconds):
                await _write(channel, messages, batch)
                await _confirmed(batch, is_blocked)
    except Exception as error:  # noqa: BLE001 - a closing channel fails its futures with whatever ended it, a plain
        # Exception included; the caller raises those that are not the broker's
        unconfirmed = error
    finally:
        batch.complete.cancel()  # frees the confirmations if the caller stopped waiting
    return [unconfirmed if result is None else result for result in batch.results]


async def _confirmed(batch: _Batch, is_blocked: Callable[[], Awaitable[bool]]) -> None:
    while not (await asyncio.wait({batch.complete}, timeout=_POLL_SECONDS))[0]:
        # RabbitMQ reports an alarm to a connection only when it publishes: this batch may have triggered the report.
        if await is_blocked():
            raise TimeoutError("RabbitMQ is in a memory or disk alarm and accepts no messages")
    batch.complete.result()


async def _write(channel: AmqpChannel, messages: Sequence[tuple[str, bytes]], batch: _Batch) -> None:
    async with channel.lock:
        first = channel.delivery_tag + 1
        batch.complete.add_done_callback(lambda _: _forget(channel, messages, first))
        for position, (message_id, _) in enumerate(messages):
            channel.confirmations[first + position] = cast("asyncio.Future[object]", _Confirm(batch, position))
            # aiormq matches returned messages by this.
            channel.message_id_delivery_tag[message_id] = first + position
        channel.delivery_tag += len(messages)
        frames = b"".join(frames for _, frames in messages)
        try:
            await channel.write_queue.put(ChannelFrame(payload=frames, should_close=False))
        except BaseException:
            # Nothing was written: the delivery tags are free again.
            channel.delivery_tag = first - 1
            for position in range(len(messages)):
                channel.confirmations.pop(first + position, None)
            raise


async def why_closed(channel: AmqpChannel, *, within: float) -> Exception | None:
    """Return the error with which the broker closed *channel*; ``None`` if none arrives within *within* seconds."""
    await asyncio.wait({channel.closing}, timeout=within)
    if channel.closing.done() and not channel.closing.cancelled():
        error = channel.closing.exception()
        return error if isinstance(error, Exception) else None
    return None


def _forget(channel: AmqpChannel, messages: Sequence[tuple[str, bytes]], first: int) -> None:
    for position, (message_id, _) in enumerate(messages):
        if channel.message_id_delivery_tag.get(message_id) == first + position:
            del channel.message_id_delivery_tag[message_id]
