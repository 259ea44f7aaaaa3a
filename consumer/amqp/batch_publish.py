"""Many messages on a channel in confirm mode, written at once and awaited at once.

The client's own publish costs a task, two futures, a lock and a wake-up a message; a batch here costs that once.
It is built on the parts of aiormq's channel that its publish is built on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from aiormq import spec
from aiormq.abc import ChannelFrame, DeliveredMessage
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.channel import not_cancelled

# What became of a message: the broker's ack, the message itself if it was returned, or an error.
Answer = spec.Basic.Ack | DeliveredMessage | BaseException

# Seconds between two looks whether the broker has stopped reading. A healthy one confirms in milliseconds, before the
# first look; in an alarm whoever waits for confirms holds up the acks of its batch.
_LOOK_SECONDS = 0.25


class _Batch:
    """The answers to one batch as they come in."""

    def __init__(self, channel: AmqpChannel, number: int) -> None:
        self.answers: list[Answer | None] = [None] * number
        # Made by the channel, which fails it when it closes.
        self.complete = channel.create_future()
        self._missing = number

    def answer(self, position: int, answer: Answer) -> None:
        self.answers[position] = answer
        self._missing -= 1
        if not self._missing and not self.complete.done():
            self.complete.set_result(None)


class _Awaited:
    """Stands where the client keeps a future for one message's confirm; it has of a future what the client uses."""

    __slots__ = ("_batch", "_done", "_position")

    def __init__(self, batch: _Batch, position: int) -> None:
        self._batch, self._position, self._done = batch, position, False

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return False

    def set_result(self, answer: Answer) -> None:
        if not self._done:
            self._done = True
            self._batch.answer(self._position, answer)

    set_exception = set_result


async def publish_batch(
    channel: AmqpChannel,
    messages: Sequence[tuple[str, bytes]],
    *,
    confirm_seconds: float,
    is_blocked: Callable[[], Awaitable[bool]],
) -> Sequence[Answer]:
    """Write *messages*, each a message id and its frames, in order, and return the broker's answer to each.

    An answer is the confirming frame, the message itself if no queue took it, or the error that stands for it: a
    refusal of the broker, ``TimeoutError`` after *confirm_seconds* or soon after *is_blocked* says that nothing is read
    any more, or what ended the channel. Raises nothing but the caller's own cancellation.
    """
    if not messages:
        return ()
    batch = _Batch(channel, len(messages))
    unanswered: BaseException = TimeoutError("not answered")
    try:
        with not_cancelled():
            async with asyncio.timeout(confirm_seconds):
                await _write(channel, messages, batch)
                await _answered(batch, is_blocked)
    except Exception as error:  # noqa: BLE001 - a closing channel fails its futures with whatever ended it, a plain
        # Exception included; the caller raises those that are not the broker's
        unanswered = error
    finally:
        batch.complete.cancel()  # whoever left early: nothing is kept for answers that nobody waits for
    return [unanswered if answer is None else answer for answer in batch.answers]


async def _answered(batch: _Batch, is_blocked: Callable[[], Awaitable[bool]]) -> None:
    while not (await asyncio.wait({batch.complete}, timeout=_LOOK_SECONDS))[0]:
        # RabbitMQ tells a connection of an alarm only when it publishes: this batch may be what it was told for.
        if await is_blocked():
            raise TimeoutError("RabbitMQ went into a memory or disk alarm and takes no messages")
    batch.complete.result()


async def _write(channel: AmqpChannel, messages: Sequence[tuple[str, bytes]], batch: _Batch) -> None:
    async with channel.lock:
        first = channel.delivery_tag + 1
        batch.complete.add_done_callback(lambda _: _forget(channel, messages, first))
        for position, (message_id, _) in enumerate(messages):
            channel.confirmations[first + position] = cast("asyncio.Future[object]", _Awaited(batch, position))
            # By this the client finds what was returned.
            channel.message_id_delivery_tag[message_id] = first + position
        channel.delivery_tag += len(messages)
        frames = b"".join(frames for _, frames in messages)
        try:
            await channel.write_queue.put(ChannelFrame(payload=frames, should_close=False))
        except BaseException:
            # The broker has not seen them: their numbers are free again.
            channel.delivery_tag = first - 1
            for position in range(len(messages)):
                channel.confirmations.pop(first + position, None)
            raise


async def why_closed(channel: AmqpChannel, *, within: float) -> Exception | None:
    """Return the error with which the broker closed *channel*; none if it gave none within so many seconds.

    For those who were waiting on it, and were told no more than that it closed.
    """
    await asyncio.wait({channel.closing}, timeout=within)
    if channel.closing.done() and not channel.closing.cancelled():
        error = channel.closing.exception()
        return error if isinstance(error, Exception) else None
    return None


def _forget(channel: AmqpChannel, messages: Sequence[tuple[str, bytes]], first: int) -> None:
    for position, (message_id, _) in enumerate(messages):
        if channel.message_id_delivery_tag.get(message_id) == first + position:
            del channel.message_id_delivery_tag[message_id]
