"""Counts the messages in the worker's queues without consuming any.

A passive declaration returns the counts and needs no permission. Snapshot a queue would mean consuming from it, which
would reorder parked messages and hide them from ``closeout parked``.
"""

from dataclasses import dataclass

from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import AMQPChannelError

from consumer.amqp.channel import not_cancelled
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.names import PARKED_QUEUE, RETRY_QUEUE, consumed_queues
from consumer.errors import UnavailableError, one_line

# Seconds for one response; the broker takes a millisecond.
_RESPONSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Depths:
    """Messages ready in each queue, over all workers, and the workers that consume."""

    queued: int
    retrying: int
    parked: int
    consumers: int


class QueueDepths:
    """Queries the broker over a dedicated connection, which an alarm never blocks because it never publishes."""

    def __init__(self, connection: BrokerConnection, intake_queues: int) -> None:
        self._connection = connection
        self._consumed = consumed_queues(intake_queues)
        self._channel: AmqpChannel | None = None

    async def read(self) -> Depths:
        """Return the depths; raise :class:`UnavailableError`, which names the queue that is missing if one is."""
        try:
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._connection.channel(confirms=False)
            with not_cancelled():
                counts = [await self._count(self._channel, queue) for queue in self._consumed]
                retrying, _ = await self._count(self._channel, RETRY_QUEUE)
                parked, _ = await self._count(self._channel, PARKED_QUEUE)
        except AMQPChannelError as error:
            raise UnavailableError(f"RabbitMQ: {one_line(error)}; run closeout topology") from error
        except BROKER_ERRORS as error:
            await self.close()
            raise UnavailableError(f"RabbitMQ is not available: {one_line(error)}") from error
        # Each worker has a consumer on every queue that is available.
        return Depths(sum(queued for queued, _ in counts), retrying, parked, max(workers for _, workers in counts))

    async def close(self) -> None:
        """Close the connection; the next :meth:`read` opens another."""
        self._channel = None
        await self._connection.close()

    async def _count(self, channel: AmqpChannel, queue: str) -> tuple[int, int]:
        declared = await channel.queue_declare(queue, passive=True, timeout=_RESPONSE_SECONDS)
        return declared.message_count or 0, declared.consumer_count or 0
