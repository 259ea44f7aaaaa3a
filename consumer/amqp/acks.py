"""Acks, gathered into as few as order permits: one ``basic.ack`` with ``multiple`` for all deliveries up to a tag.

It is not only cheaper. A channel keeps at most 32 settlements in flight to a quorum queue and the rest in its own
memory; a channel that closes right behind two hundred single acks loses up to 168 of them (measured on RabbitMQ 3.10
and 4, see ``tests/integration/amqp/test_acks.py``), and runs that were committed come again. One ``multiple`` is one
settlement.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from aiormq.abc import AbstractChannel

from consumer.amqp.connection import BROKER_ERRORS
from consumer.errors import one_line

log = structlog.get_logger(__name__)


class Acks:
    """The delivery tags of one channel, which count from 1, and which of them were answered.

    Deliveries that wait for an unfinished one before them are acked one by one if they are over *hold_back*: their
    prefetch is needed. A channel that is gone is no error: what it was not told of, the broker delivers again.
    """

    def __init__(self, channel: AbstractChannel, *, hold_back: int) -> None:
        self._channel = channel
        self._hold_back = hold_back
        self._sent_up_to = 0  # every tag up to here is answered, and the broker was told
        self._answered: set[int] = set()  # tags above it that are answered
        self._untold: set[int] = set()  # those of them whose ack the broker was not yet sent
        self._sending = asyncio.Lock()

    def ack(self, tag: int) -> None:
        """Remember that *tag* is done with; :meth:`flush` tells the broker."""
        self._answered.add(tag)
        self._untold.add(tag)

    async def requeue(self, tag: int) -> None:
        """Give *tag* back to its queue, at once."""
        if self._channel.is_closed:
            return
        with _comes_again():
            await self._channel.basic_nack(tag, requeue=True, wait=False)
            self._answered.add(tag)  # only now: an ack of all up to a later tag must not cover it

    async def flush(self, *, everything: bool = False) -> None:
        """Ack all below the first tag that is still being worked on; of those above it, too many or *everything*."""
        if self._channel.is_closed:
            return
        # One after the other: an ack of all up to a later tag, sent by another transaction while this one waits to be
        # written, covers what this one acks then, and to the broker that is an unknown tag, which closes the channel.
        async with self._sending:
            await self._flush(everything=everything)

    async def _flush(self, *, everything: bool) -> None:
        upto = self._sent_up_to
        while upto + 1 in self._answered:
            upto += 1
            self._answered.discard(upto)
        self._sent_up_to = upto
        covered = {tag for tag in self._untold if tag <= upto}
        self._untold -= covered
        with _comes_again():
            if covered:
                await self._channel.basic_ack(max(covered), multiple=True, wait=False)
            if everything or len(self._untold) > self._hold_back:
                untold, self._untold = sorted(self._untold), set()
                for tag in untold:
                    await self._channel.basic_ack(tag, wait=False)


@contextmanager
def _comes_again() -> Iterator[None]:
    try:
        yield
    except BROKER_ERRORS as error:
        log.info("deliveries not settled; they come again", error=one_line(error))
