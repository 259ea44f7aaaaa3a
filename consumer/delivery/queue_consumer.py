"""One queue's consumer: its connection, its channel, and the acks of what arrives on it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.acks import Acks
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.delivery.intake import Delivery, Intake
from consumer.delivery.watch import Probes, watch_servers
from consumer.errors import UnavailableError, one_line

# Seconds for the broker's response to a request about the consumer.
_RESPONSE_SECONDS = 10.0
# Seconds without a delivery in which RabbitMQ counts no consumer of a queue that is consumed.
_UNCOUNTED_SECONDS = 3.0


class QueueConsumer:
    """Consumes one queue until it fails; :meth:`start` may be called again after :meth:`abandon`."""

    def __init__(self, queue: str, connection: BrokerConnection, intake: Intake, *, prefetch: int) -> None:
        self.queue = queue
        self._connection = connection
        self._intake = intake
        self._prefetch = prefetch
        self._channel: AmqpChannel | None = None
        self._acks: Acks | None = None
        self._tag = ""
        self._received = 0
        self._failed = asyncio.Event()
        self._why = ""

    async def start(self) -> None:
        """Consume; raise :class:`UnavailableError`, which names what is unavailable: the broker or the queue."""
        self._failed.clear()
        channel = await self._connection.channel(confirms=False)
        acks = Acks(channel, hold_back=self._prefetch // 2)

        async def on_delivery(message: DeliveredMessage) -> None:
            self._received += 1
            self._intake.put(message, acks)

        self._channel, self._acks = channel, acks
        channel.closing.add_done_callback(partial(self._on_closed, channel))
        channel.on_consumer_cancel_callbacks.add(partial(self._on_cancelled, channel))
        try:
            await channel.basic_qos(prefetch_count=self._prefetch, timeout=_RESPONSE_SECONDS)
            consumed = await channel.basic_consume(self.queue, on_delivery, timeout=_RESPONSE_SECONDS)
        except BROKER_ERRORS as error:
            message = one_line(error)
            # What RabbitMQ returns for a quorum queue without a leader; it closes the connection as well.
            no_leader = "INTERNAL_ERROR" in message
            hint = "the queue may have no leader" if no_leader else "run closeout topology if the queue does not exist"
            raise UnavailableError(f"cannot consume {self.queue}: {message} ({hint})") from error
        self._tag = consumed.consumer_tag or ""

    async def failure(self, *, watched: bool) -> str:
        """Wait until the consumer fails, and return why; *watched*: also find out that its queue does not respond."""
        if watched and (
            why := await watch_servers(self._failed, await self._watches(), progress=lambda: self._received)
        ):
            return why
        await self._failed.wait()
        return self._why

    async def _watches(self) -> Probes:
        """Return a probe that fails once the queue does not respond.

        A quorum queue without a leader neither cancels its consumers nor closes their channels. RabbitMQ reports it
        without messages and consumers.
        """
        channel = await self._connection.channel(confirms=False)
        counted_at, received = monotonic(), self._received

        async def probe() -> None:
            nonlocal counted_at, received
            declared = await channel.queue_declare(self.queue, passive=True, timeout=_RESPONSE_SECONDS)
            if declared.consumer_count or self._received != received:
                counted_at, received = monotonic(), self._received
            elif monotonic() > counted_at + _UNCOUNTED_SECONDS:
                raise UnavailableError(f"RabbitMQ's queue {self.queue} does not respond; it may have no leader")

        return {f"RabbitMQ's queue {self.queue}": probe}

    async def probe(self) -> Callable[[], Awaitable[object]]:
        """Return a request that a reachable broker responds to."""
        # A separate channel: it can be lost in the middle of a request. Without a consumer, the count has no effect.
        channel = await self._connection.channel(confirms=False)
        return partial(channel.basic_qos, prefetch_count=1)

    async def cancel(self, *, within: float) -> None:
        """Receive nothing more; what was received can still be acked."""
        if self._channel is not None:
            with contextlib.suppress(*BROKER_ERRORS):  # a lost channel has no consumer to cancel
                await self._channel.basic_cancel(self._tag, timeout=within)

    async def flush(self) -> None:
        """Send every ack that is due."""
        if self._acks is not None:
            await self._acks.flush(everything=True)

    async def close_channel(self, *, within: float) -> None:
        """Close the channel: the close frame follows the last acks, which closing the connection could lose."""
        if self._channel is not None:
            with contextlib.suppress(*BROKER_ERRORS):
                await asyncio.wait_for(self._channel.close(), within)

    async def abandon(self) -> list[Delivery]:
        """Close the connection, and return the deliveries that wait for a transaction; the broker requeues them."""
        acks, self._acks, self._channel = self._acks, None, None
        waiting = self._intake.give_back(acks) if acks is not None else []
        await self._connection.close()
        return waiting

    def _on_closed(self, channel: AmqpChannel, closing: "asyncio.Future[object]") -> None:
        error = None if closing.cancelled() else closing.exception()
        self._fail(channel, f"RabbitMQ closed the channel: {one_line(error) if error else 'no reason given'}")

    def _on_cancelled(self, channel: AmqpChannel, _frame: object) -> None:
        # The queue was deleted or lost its leader: the broker sends nothing more to this consumer.
        self._fail(channel, f"RabbitMQ cancelled the consumer of {self.queue}; the queue may have been deleted")

    def _fail(self, channel: AmqpChannel, why: str) -> None:
        # The channel of an earlier attempt may close late.
        if channel is self._channel and not self._failed.is_set():
            self._why = why
            self._failed.set()
