"""The consumers of all intake queues, with one prefetch budget.

Quorum queues have no prefetch count for several consumers (``global``), so each has its share of ``PREFETCH_COUNT``.
With several queues each has its own connection: RabbitMQ closes the connection of a client that consumes a queue
without a leader, and the others must not lose theirs.
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from consumer.delivery.intake import Delivery
from consumer.delivery.queue_consumer import QueueConsumer
from consumer.delivery.watch import Probes
from consumer.errors import UnavailableError, one_line
from consumer.health import Health
from consumer.metrics import Metrics

log = structlog.get_logger(__name__)

# Seconds between two attempts at a queue that is unavailable; RabbitMQ logs each.
RETRY_SECONDS = 3.0


class Consumers:
    """Consumes every queue that is available, and retries the others until none is left."""

    def __init__(
        self,
        consumers: Sequence[QueueConsumer],
        *,
        requeued: Callable[[Sequence[Delivery]], None],
        health: Health,
        metrics: Metrics,
    ) -> None:
        self._consumers = consumers
        self._requeued = requeued
        self._health = health
        self._unavailable = metrics.intake_queue_unavailable
        for consumer in consumers:
            self._unavailable.labels(consumer.queue).set(0)
        self._tasks: list[asyncio.Task[None]] = []
        self._consuming: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._decided = asyncio.Event()
        self._on_none_left: Callable[[str], None] = lambda _why: None

    @property
    def queues(self) -> list[str]:
        """The names of the queues."""
        return [consumer.queue for consumer in self._consumers]

    async def start(self, on_none_left: Callable[[str], None]) -> None:
        """Return once a queue is consumed; call *on_none_left* with the reason once none is any more.

        Raises :class:`UnavailableError` if no queue can be consumed.
        """
        self._decided.clear()
        self._on_none_left = on_none_left
        self._tasks = [asyncio.create_task(self._keep(consumer)) for consumer in self._consumers]
        for task in self._tasks:
            task.add_done_callback(self._on_end)
        await self._decided.wait()
        if not self._consuming:
            raise UnavailableError(self._reason())

    async def probes(self) -> Probes:
        """Return the probe of the broker; several queues are each probed over their own connections instead."""
        return {"RabbitMQ": await self._consumers[0].probe()} if len(self._consumers) == 1 else {}

    async def cancel(self, *, within: float) -> None:
        """Receive nothing more, and retry no queue; deliveries in progress can still be acked."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(consumer.cancel(within=within) for consumer in self._consumers))

    async def flush(self) -> None:
        """Send every ack that is due."""
        for consumer in self._consumers:
            await consumer.flush()

    async def close_channels(self, *, within: float) -> None:
        """Close all channels after their last acks."""
        await asyncio.gather(*(consumer.close_channel(within=within) for consumer in self._consumers))

    async def close(self) -> None:
        """Close all connections; raise what ended a task, which is a bug."""
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(consumer.abandon() for consumer in self._consumers))
        self._tasks = []
        self._consuming.clear()
        for queue in self._reasons:
            self._unavailable.labels(queue).set(0)
        self._reasons.clear()
        self._health.unavailable_queues.clear()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _keep(self, consumer: QueueConsumer) -> None:
        while True:
            try:
                await consumer.start()
                self._found(consumer.queue)
                why = await consumer.failure(watched=len(self._consumers) > 1)
            except UnavailableError as error:
                why = one_line(error)
            self._lost(consumer.queue, why)
            self._requeued(await consumer.abandon())
            await asyncio.sleep(RETRY_SECONDS)

    def _found(self, queue: str) -> None:
        self._consuming.add(queue)
        self._reasons.pop(queue, None)
        if self._health.unavailable_queues.pop(queue, ""):
            self._unavailable.labels(queue).set(0)
            log.info("queue consumed again", queue=queue)
        self._report()
        self._decided.set()

    def _lost(self, queue: str, why: str) -> None:
        self._consuming.discard(queue)
        self._reasons[queue] = why
        if self._consuming:
            self._report()
        elif len(self._reasons) == len(self._consumers):
            self._on_none_left(self._reason())
            self._decided.set()

    def _report(self) -> None:
        for queue, why in self._reasons.items():
            if self._health.unavailable_queues.get(queue) != why:
                log.warning("queue not consumed; others are", queue=queue, error=why)
            self._health.unavailable_queues[queue] = why
            self._unavailable.labels(queue).set(1)

    def _reason(self) -> str:
        return next((self._reasons[queue] for queue in self.queues if queue in self._reasons), "no queue is consumed")

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()):
            self._on_none_left(one_line(error))
            self._decided.set()
