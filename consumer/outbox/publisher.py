"""Publishing a run's events: mandatory, persistent, and counted only once RabbitMQ confirmed them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import structlog
from aiormq import spec
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.batch_publish import Answer, publish_batch, why_closed
from consumer.amqp.channel import ChannelLostError
from consumer.amqp.confirmed_channel import CONFIRM_TIMEOUT_SECONDS, REASON_SECONDS, ConfirmedChannel
from consumer.amqp.connection import BROKER_ERRORS
from consumer.amqp.frames import event_frames
from consumer.contract.events import OutboxEvent
from consumer.contract.names import EVENTS_EXCHANGE
from consumer.errors import UnavailableError, one_line
from consumer.metrics import Metrics
from domains.run import RunKey

log = structlog.get_logger(__name__)

# Opened around one write of events and the wait for their confirms; may yield a function that takes a failure's text.
OnFailure = Callable[[str], None]
ObservePublish = Callable[[Sequence[OutboxEvent]], AbstractContextManager[OnFailure | None]]


def _unobserved(_events: Sequence[OutboxEvent]) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(slots=True)
class Published:
    """What became of a batch of events: the confirmed ones, and why the others were not, if any."""

    confirmed: list[OutboxEvent] = field(default_factory=list)
    failure: str | None = None


class EventPublisher:
    """Publishes outbox events. The worker's fast path and its relay have one each, on one connection."""

    def __init__(
        self,
        channel: ConfirmedChannel,
        *,
        metrics: Metrics,
        require_subscribers: bool = False,
        observe: ObservePublish = _unobserved,
    ) -> None:
        self._channel = channel
        self._metrics = metrics
        self._observe = observe
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
            with self._observe(events) as failed:
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
        if lost := next((answer for answer in answers if isinstance(answer, ChannelLostError)), None):
            reason = await why_closed(channel, within=REASON_SECONDS) or lost
            answers = [reason if isinstance(answer, ChannelLostError) else answer for answer in answers]
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
