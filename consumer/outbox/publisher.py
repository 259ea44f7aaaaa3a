"""The confirmed channel: messages go out mandatory and persistent, and count only once the broker confirmed them."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from weakref import WeakValueDictionary

import structlog
from aiormq import spec
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelInvalidStateError, ChannelNotFoundEntity

from consumer.amqp.batch_publish import Answer, publish_batch, why_closed
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.amqp.frames import event_frames
from consumer.contract.events import OutboxEvent
from consumer.errors import UnavailableError, one_line
from consumer.metrics import Metrics
from consumer.tracing.interface import NoTracing, Tracing
from domains.run import RunKey

log = structlog.get_logger(__name__)

EVENTS_EXCHANGE = "governance.events"
# Leads to the worker's own queues and nowhere else. Whoever may write the default exchange may write every queue.
INTERNAL_EXCHANGE = "closeout.internal"
_DEFAULT_EXCHANGE = ""
# Seconds until a confirm is given up. A healthy quorum queue confirms in milliseconds; a leader election takes under
# one second, a node restart a few. What is given up stays in the outbox.
CONFIRM_TIMEOUT_SECONDS = 10.0
# Seconds to learn why a channel closed: the broker said so in the frame that closed it.
_REASON_SECONDS = 1.0


@dataclass(slots=True)
class Published:
    """What became of a batch of events: the confirmed ones, and why the others were not, if any."""

    confirmed: list[OutboxEvent] = field(default_factory=list)
    failure: str | None = None


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
            answer = await channel.basic_publish(
                body, exchange=exchange, routing_key=routing_key, properties=properties, mandatory=True,
                timeout=CONFIRM_TIMEOUT_SECONDS, wait=False,
            )  # fmt: skip
        except BROKER_ERRORS as error:
            raise UnavailableError(f"not confirmed by RabbitMQ: {one_line(error)}") from error
        except asyncio.CancelledError:
            # aiormq rejects what waits on a closing channel with CancelledError; only ours may pass as one.
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            reason = await why_closed(channel, within=_REASON_SECONDS)
            words = one_line(reason) if reason else "the channel was closed"
            raise UnavailableError(f"not confirmed by RabbitMQ: {words}") from reason
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


class EventPublisher:
    """Publishes outbox events. The worker's fast path and its relay have one each, on one connection."""

    def __init__(
        self,
        channel: ConfirmedChannel,
        *,
        metrics: Metrics,
        require_subscribers: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self._channel = channel
        self._metrics = metrics
        self._tracing = tracing or NoTracing()
        self._require_subscribers = require_subscribers
        self._under_way: set[RunKey] = set()

    async def publish(self, events: Sequence[OutboxEvent]) -> Published:
        """Publish *events*, in order within each run, and wait for their confirms; never raises for the broker.

        Of each run only a prefix counts as confirmed: after an event that failed, the run's later ones are left to
        be sent again behind it, so that a subscriber that remembers ids sees the run's order. Events of a run that
        somebody publishes here at the moment are left to them: neither confirmed nor a failure.
        """
        # A returned event is known by its id: of the same one sent twice at once, one return would be taken for the
        # other's, and an event that no queue took would count as taken.
        events = [event for event in events if event.key not in self._under_way]
        if not events:
            return Published()
        keys = {event.key for event in events}
        self._under_way |= keys
        try:
            with self._tracing.sending(events) as failed:
                outcome = await self._publish(events)
                if failed is not None and outcome.failure is not None:
                    failed(outcome.failure)
        finally:
            self._under_way -= keys
        return outcome

    async def _publish(self, events: Sequence[OutboxEvent]) -> Published:
        try:
            channel = await self._channel.opened()
        except UnavailableError as error:
            return Published(failure=one_line(error))
        started = perf_counter()
        messages = [_framed(channel, event) for event in events]
        answers = await publish_batch(
            channel, messages, confirm_seconds=CONFIRM_TIMEOUT_SECONDS, is_blocked=self._channel.is_blocked
        )
        self._metrics.publish_duration.observe(perf_counter() - started)
        if any(isinstance(answer, asyncio.CancelledError) for answer in answers):
            # Ours would have been raised; this one is aiormq's way of saying that the channel closed.
            reason = await why_closed(channel, within=_REASON_SECONDS) or ChannelInvalidStateError(
                "the channel was closed"
            )
            answers = [reason if isinstance(answer, asyncio.CancelledError) else answer for answer in answers]
        return self._count(events, answers)

    def _count(self, events: Sequence[OutboxEvent], answers: Sequence[Answer]) -> Published:
        outcome = Published()
        broken: set[RunKey] = set()
        for event, answer in zip(events, answers, strict=True):
            failure = self._failure(event, answer)
            if failure is not None:
                broken.add(event.key)
                outcome.failure = outcome.failure or failure
            elif not broken or event.key not in broken:
                outcome.confirmed.append(event)
        # Once a batch, not once an event.
        for kind, number in Counter(event.type for event in outcome.confirmed).items():
            self._metrics.events_published.labels(kind).inc(number)
        return outcome

    def _failure(self, event: OutboxEvent, answer: Answer) -> str | None:
        """Say why *answer* is no confirm; only what the broker has confirmed in so many words is one."""
        match answer:
            case spec.Basic.Ack():
                return None
            case DeliveredMessage():
                self._metrics.events_unroutable.labels(event.type).inc()
                if self._require_subscribers:
                    return f"no queue is bound for {event.routing_key} (REQUIRE_EVENT_SUBSCRIBERS)"
                return None
            case _ if isinstance(answer, BROKER_ERRORS):
                return one_line(answer)
            case _:
                raise answer


def _other(exchange: str) -> str:
    return _DEFAULT_EXCHANGE if exchange == INTERNAL_EXCHANGE else INTERNAL_EXCHANGE


def _framed(channel: AmqpChannel, event: OutboxEvent) -> tuple[str, bytes]:
    event_id = str(event.event_id)
    frames = event_frames(
        channel.number,
        exchange=EVENTS_EXCHANGE,
        routing_key=event.routing_key,
        run_id=event.run_id,
        event_id=event_id,
        kind=event.type,
        body=event.body.encode(),
        body_max=channel.max_content_size,
        trace=event.trace,
    )
    return event_id, frames
