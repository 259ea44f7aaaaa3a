"""Publishes events: mandatory, persistent, and counted only once RabbitMQ has confirmed them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import structlog
from aiormq import spec
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.batch_publish import PublishResult, publish_batch, why_closed
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
    """The outcome for a batch: the confirmed events, and why the others were not confirmed."""

    confirmed: list[OutboxEvent] = field(default_factory=list)
    failure: str | None = None


class EventPublisher:
    """Publishes outbox events. The worker's fast path and its relay each have one, on one connection."""

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
        self._in_flight: set[RunKey] = set()

    async def publish(self, events: Sequence[OutboxEvent]) -> Published:
        """Publish *events*, in order within each run, and wait for their confirms; never raises for broker errors.

        Only a prefix of each run's events counts as confirmed: after a failed event the later ones are published again
        behind it, so that a subscriber that remembers ids sees the run's order. Events of a run that another call is
        publishing now are skipped: neither confirmed nor failed.
        """
        # aiormq matches a returned event by its id: if one event were in flight twice, the return of one would count
        # for the other, and an unroutable event would count as confirmed.
        events = [event for event in events if event.key not in self._in_flight]
        if not events:
            return Published()
        keys = {event.key for event in events}
        self._in_flight |= keys
        try:
            with self._observe(events) as failed:
                outcome = await self._publish(events)
                if failed is not None and outcome.failure is not None:
                    failed(outcome.failure)
        finally:
            self._in_flight -= keys
        return outcome

    async def _publish(self, events: Sequence[OutboxEvent]) -> Published:
        try:
            channel = await self._channel.opened()
        except UnavailableError as error:
            return Published(failure=one_line(error))
        started = perf_counter()
        messages = [_framed(channel, event) for event in events]
        results = await publish_batch(
            channel, messages, confirm_seconds=CONFIRM_TIMEOUT_SECONDS, is_blocked=self._channel.is_blocked
        )
        self._metrics.publish_duration.observe(perf_counter() - started)
        if lost := next((result for result in results if isinstance(result, ChannelLostError)), None):
            reason = await why_closed(channel, within=REASON_SECONDS) or lost
            results = [reason if isinstance(result, ChannelLostError) else result for result in results]
        return self._count(events, results)

    def _count(self, events: Sequence[OutboxEvent], results: Sequence[PublishResult]) -> Published:
        outcome = Published()
        broken: set[RunKey] = set()
        for event, result in zip(events, results, strict=True):
            failure = self._failure(event, result)
            if failure is not None:
                broken.add(event.key)
                outcome.failure = outcome.failure or failure
            elif not broken or event.key not in broken:
                outcome.confirmed.append(event)
        # Once per batch, not once per event.
        for kind, number in Counter(event.type for event in outcome.confirmed).items():
            self._metrics.events_published.labels(kind).inc(number)
        return outcome

    def _failure(self, event: OutboxEvent, result: PublishResult) -> str | None:
        """Return why *result* is not a confirm, or ``None``; only an explicit ack is one."""
        match result:
            case spec.Basic.Ack():
                return None
            case DeliveredMessage():
                self._metrics.events_unroutable.labels(event.type).inc()
                if self._require_subscribers:
                    return f"no queue is bound for {event.routing_key} (REQUIRE_EVENT_SUBSCRIBERS)"
                return None
            case _ if isinstance(result, BROKER_ERRORS):
                return one_line(result)
            case _:
                raise result


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
