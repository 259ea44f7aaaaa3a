"""One AMQP channel in confirm mode, reopened after the broker closes it. Messages count only once confirmed."""

import asyncio
from weakref import WeakValueDictionary

import structlog
from aiormq import spec
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from consumer.amqp.batch_publish import why_closed
from consumer.amqp.channel import ChannelLostError, not_cancelled
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.names import INTERNAL_EXCHANGE
from consumer.errors import UnavailableError, one_line

log = structlog.get_logger(__name__)

_DEFAULT_EXCHANGE = ""
# Seconds until a confirm is given up. A healthy quorum queue confirms in milliseconds; a leader election takes under
# one second, a node restart a few. What is given up stays in the outbox.
CONFIRM_TIMEOUT_SECONDS = 10.0
# Seconds to learn why a channel closed: the broker said so in the frame that closed it.
REASON_SECONDS = 1.0


class ConfirmedChannel:
    """A channel in confirm mode, opened anew after the broker closed it."""

    def __init__(self, connection: BrokerConnection) -> None:
        self._connection = connection
        self._channel: AmqpChannel | None = None
        self._lock = asyncio.Lock()
        self._to_queues = INTERNAL_EXCHANGE
        self._one_by_one: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def user(self) -> str | None:
        """The broker's user that publishes here, by the URL; the only ``user_id`` that the broker lets it state."""
        return self._connection.user

    async def is_blocked(self) -> bool:
        """Say whether the broker, in an alarm, has stopped reading what is published here."""
        return await self._connection.is_blocked()

    async def opened(self) -> AmqpChannel:
        """Return an open channel; raise :class:`UnavailableError` if the broker is away or takes nothing now."""
        async with self._lock:
            if await self.is_blocked():
                raise UnavailableError("RabbitMQ is in a memory or disk alarm and takes no messages")
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._connection.channel(confirms=True)
            return self._channel

    async def send(self, *, exchange: str, routing_key: str, body: bytes, properties: spec.Basic.Properties) -> None:
        """Publish one message and wait for its confirm; raise :class:`UnavailableError` if it does not come.

        A message that no queue took counts as unconfirmed.
        """
        # The client knows a returned message by its id, which is the sender's: of two under way at once it would take
        # the return of the first for the second's, and the first would count as taken, be acked, and be lost.
        named = properties.message_id
        async with self._one_by_one.setdefault(named, asyncio.Lock()) if named else asyncio.Lock():
            await self._send(exchange, routing_key, body, properties)

    async def _send(self, exchange: str, routing_key: str, body: bytes, properties: spec.Basic.Properties) -> None:
        channel = await self.opened()
        try:
            with not_cancelled():
                answer = await channel.basic_publish(
                    body, exchange=exchange, routing_key=routing_key, properties=properties, mandatory=True,
                    timeout=CONFIRM_TIMEOUT_SECONDS, wait=False,
                )  # fmt: skip
        except ChannelLostError as error:
            reason = await why_closed(channel, within=REASON_SECONDS) or error
            raise UnavailableError(f"not confirmed by RabbitMQ: {one_line(reason)}") from reason
        except BROKER_ERRORS as error:
            raise UnavailableError(f"not confirmed by RabbitMQ: {one_line(error)}") from error
        if isinstance(answer, DeliveredMessage):
            raise UnavailableError(f"no queue took a message for {exchange or 'queue'} {routing_key}")

    async def send_to_queue(self, queue: str, *, body: bytes, properties: spec.Basic.Properties) -> None:
        """Publish one message to *queue*, one of the worker's own; raises as :meth:`send` does.

        Where a topology of before has no exchange for that, or rights of before do not name it, the default exchange
        takes the message; whichever is refused, the other is tried, so that topology, rights and workers can change
        one after another.
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
                    log.warning("messages are parked through another exchange", why=one_line(refusals[0]), now=exchange)
                return
        raise UnavailableError("; ".join(map(one_line, refusals))) from refusals[0].__cause__


def _other(exchange: str) -> str:
    return _DEFAULT_EXCHANGE if exchange == INTERNAL_EXCHANGE else INTERNAL_EXCHANGE
