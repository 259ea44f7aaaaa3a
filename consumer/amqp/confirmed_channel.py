"""One AMQP channel in confirm mode, reopened after the broker closes it. Messages count only once confirmed."""

import asyncio
from contextlib import suppress
from weakref import WeakValueDictionary

import structlog
from aiormq import spec
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import AMQPChannelError, ChannelAccessRefused, ChannelNotFoundEntity, DeliveryError

from consumer.amqp.batch_publish import why_closed
from consumer.amqp.channel import ChannelLostError, not_cancelled
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.names import INTERNAL_EXCHANGE
from consumer.errors import UnavailableError, one_line

log = structlog.get_logger(__name__)

_DEFAULT_EXCHANGE = ""
# Seconds to wait for a confirm. A healthy quorum queue confirms in milliseconds; a leader election takes under one
# second, a node restart a few. An unconfirmed event stays in the outbox.
CONFIRM_TIMEOUT_SECONDS = 10.0
# Seconds to wait for the broker's reason after a channel closed.
REASON_SECONDS = 5.0


class RefusedError(UnavailableError):
    """The broker is available and refuses this message: its queue is full or missing, or a permission is."""


class ConfirmedChannel:
    """A channel in confirm mode, reopened after the broker closes it."""

    def __init__(self, connection: BrokerConnection) -> None:
        self._connection = connection
        self._channel: AmqpChannel | None = None
        self._lock = asyncio.Lock()
        self._to_queues = INTERNAL_EXCHANGE
        self._one_by_one: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def user(self) -> str | None:
        """The broker user of this connection; the only ``user_id`` that the broker accepts from it."""
        return self._connection.user

    async def is_blocked(self) -> bool:
        """Return whether a broker alarm blocks publishing on this connection."""
        return await self._connection.is_blocked()

    async def opened(self) -> AmqpChannel:
        """Return an open channel; raise :class:`UnavailableError` if the broker is unavailable or in an alarm."""
        async with self._lock:
            if await self.is_blocked():
                raise UnavailableError("RabbitMQ is in a memory or disk alarm and accepts no messages")
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._connection.channel(confirms=True)
            return self._channel

    def replace(self, channel: AmqpChannel) -> None:
        """Use a new channel from now on; close *channel* once its last confirms have had their time.

        After a nack of a full queue RabbitMQ nacks all later messages for it on that channel, even once there is room
        (rabbitmq-server #12206).
        """
        if self._channel is channel:
            self._channel = None
            closing = asyncio.get_running_loop().create_task(_close_later(channel))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def send(self, *, exchange: str, routing_key: str, body: bytes, properties: spec.Basic.Properties) -> None:
        """Publish one message and wait for its confirm; raise :class:`UnavailableError` without one.

        It is a :class:`RefusedError` if the broker nacks or returns the message, or closes the channel because of it.
        """
        # aiormq matches a returned message by its id, which the sender chose. With two messages of one id in
        # flight, the return of the first would be matched to the second; the first would count as confirmed, be acked,
        # and be lost.
        named = properties.message_id
        async with self._one_by_one.setdefault(named, asyncio.Lock()) if named else asyncio.Lock():
            await self._send(exchange, routing_key, body, properties)

    async def _send(self, exchange: str, routing_key: str, body: bytes, properties: spec.Basic.Properties) -> None:
        channel = await self.opened()
        try:
            with not_cancelled():
                result = await channel.basic_publish(
                    body, exchange=exchange, routing_key=routing_key, properties=properties, mandatory=True,
                    timeout=CONFIRM_TIMEOUT_SECONDS, wait=False,
                )  # fmt: skip
        except ChannelLostError as error:
            reason = await why_closed(channel, within=REASON_SECONDS) or error
            raise _unconfirmed(reason) from reason
        except DeliveryError as error:
            self.replace(channel)
            raise RefusedError(f"{routing_key} is full, or its leader is unavailable: RabbitMQ sent a nack") from error
        except BROKER_ERRORS as error:
            raise _unconfirmed(error) from error
        if isinstance(result, DeliveredMessage):
            raise RefusedError(f"no queue accepted a message for {exchange or 'queue'} {routing_key}")

    async def send_to_queue(self, queue: str, *, body: bytes, properties: spec.Basic.Properties) -> None:
        """Publish one message to *queue*, a queue of the worker; raises as :meth:`send` does.

        An older topology has no internal exchange, and older permissions do not include it. If the broker refuses the
        internal or the default exchange, the other is tried, so that topology, permissions and workers can be upgraded
        in any order.
        """
        refusals: list[UnavailableError] = []
        for exchange in (self._to_queues, _other(self._to_queues)):
            try:
                await self.send(exchange=exchange, routing_key=queue, body=body, properties=properties)
            except UnavailableError as error:
                if not isinstance(error.__cause__, ChannelAccessRefused | ChannelNotFoundEntity):
                    raise
                refusals.append(error)
                self._to_queues = _other(exchange)
            else:
                if refusals:
                    log.warning(
                        "messages are parked through the other exchange", why=one_line(refusals[0]), now=exchange
                    )
                return
        raise RefusedError("; ".join(map(one_line, refusals))) from refusals[0].__cause__


async def _close_later(channel: AmqpChannel) -> None:
    await asyncio.sleep(CONFIRM_TIMEOUT_SECONDS)
    with suppress(*BROKER_ERRORS):
        await channel.close()


def _unconfirmed(error: Exception) -> UnavailableError:
    kind = RefusedError if isinstance(error, AMQPChannelError) else UnavailableError
    return kind(f"not confirmed by RabbitMQ: {one_line(error)}")


def _other(exchange: str) -> str:
    return _DEFAULT_EXCHANGE if exchange == INTERNAL_EXCHANGE else INTERNAL_EXCHANGE
