"""Deliveries that wait for a transaction. Batches form naturally: a batch never waits for more deliveries."""

import asyncio
from collections import deque
from datetime import UTC, datetime
from typing import NamedTuple

from aiormq.abc import DeliveredMessage

from consumer.amqp.acks import Acks
from consumer.metrics import Metrics

# Maximum total size of the bodies in a batch, in bytes. A decoded message takes several times the memory of its body.
BATCH_MAX_BYTES = 16 * 1024 * 1024


class Delivery(NamedTuple):
    """A message as the broker delivered it, its arrival time, and where its ack goes."""

    message: DeliveredMessage
    received_at: datetime
    acks: Acks

    @property
    def tag(self) -> int:
        """The delivery tag; every delivery has one."""
        return self.message.delivery_tag or 0


class Intake:
    """A queue between the consumer's callback and the transactions, bounded by the prefetch count."""

    def __init__(self, metrics: Metrics) -> None:
        self._waiting: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._taken = 0
        # Deliveries received and settled; rises while both servers respond.
        self.progress = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        # Computed at each scrape, not updated with each message.
        metrics.inflight.set_function(lambda: len(self._waiting) + self._taken)

    def put(self, message: DeliveredMessage, acks: Acks) -> None:
        """Add one delivery."""
        self._waiting.append(Delivery(message, datetime.now(UTC), acks))
        self._arrived.set()
        self.progress += 1
        self._changed()

    async def take(self, at_most: int) -> list[Delivery]:
        """Wait for the first delivery and return it with those that have arrived; empty once closed and drained.

        At most ``BATCH_MAX_BYTES`` of bodies, but always one message. Every batch that is taken must be
        :meth:`settled`.
        """
        while not self._waiting:
            if self._closed:
                return []
            self._arrived.clear()
            await self._arrived.wait()
        batch = [self._waiting.popleft()]
        size = len(batch[0].message.body)
        while self._waiting and len(batch) < at_most:
            size += len(self._waiting[0].message.body)
            if size > BATCH_MAX_BYTES:
                break
            batch.append(self._waiting.popleft())
        self._taken += len(batch)
        self._changed()
        return batch

    def settled(self, batch: list[Delivery]) -> None:
        """Record that every delivery of a taken *batch* is settled."""
        self._taken -= len(batch)
        self.progress += 1
        self._changed()

    def give_back(self, of: Acks | None = None) -> list[Delivery]:
        """Remove and return the deliveries that were not taken, or only those that arrived with *of*."""
        waiting = [delivery for delivery in self._waiting if of is None or delivery.acks is of]
        self._waiting = deque(delivery for delivery in self._waiting if of is not None and delivery.acks is not of)
        self._changed()
        return waiting

    async def idle(self) -> None:
        """Wait until no delivery is queued or in progress."""
        await self._idle.wait()

    def close(self) -> None:
        """Let every :meth:`take` return once the queue is empty."""
        self._closed = True
        self._arrived.set()

    def _changed(self) -> None:
        if self._waiting or self._taken:
            self._idle.clear()
        else:
            self._idle.set()
