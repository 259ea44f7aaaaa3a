"""Publishes events as persistent, mandatory messages; one counts as published only once it is confirmed."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import TypeGuard

import structlog
from aiormq import spec
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import AMQPChannelError, ChannelAccessRefused, ChannelNotFoundEntity, DeliveryError

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

# Seconds for which a refused routing key is not tried again: each refusal closes the channel.
REFUSED_KEY_SECONDS = 30.0


def _unobserved(_events: Sequence[OutboxEvent]) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(slots=True)
class Published:
    """The outcome for a batch: the confirmed events, and why the others were not confirmed.

    *refused* are the runs with an event that the broker refused while it accepted others, each with the reason.
    """

    confirmed: list[OutboxEvent] = field(default_factory=list)
    failure: str | None = None
    refused: dict[RunKey, str] = field(default_factory=dict)

    def add(self, other: "Published") -> None:
        """Add the outcome of another batch."""
        self.confirmed += other.confirmed
        self.failure = self.failure or other.failure
        self.refused |= other.refused


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
        self._refused_keys: dict[str, tuple[float, str]] = {}

    async def publish(self, events: Sequence[OutboxEvent]) -> Published:
        """Publish *events*, in order within each run, and wait for their confirms; never raises for broker errors.

        Only a prefix of each run's events counts as confirmed: after a failed event the later ones are published again
        behind it, so that a subscriber that remembers ids sees the run's order. Events of a run that another call is
        publishing now are skipped: neither confirmed nor failed. An event that the broker refuses closes the channel
        for all: it is found by halving the batch, and the others are published without it.
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
        if not self._refused_keys:
            return await self._attempt(events)
        # Not sent: events with a refused key, and those after them in their run.
        refused: dict[RunKey, str] = {}
        sent: list[OutboxEvent] = []
        for event in events:
            if event.key in refused:
                continue
            if (why := self._why_refused(event.routing_key)) is None:
                sent.append(event)
            else:
                refused[event.key] = why
        outcome = await self._attempt(sent) if sent else Published()
        outcome.refused |= refused
        outcome.failure = outcome.failure or next(iter(refused.values()), None)
        return outcome

    def _why_refused(self, routing_key: str) -> str | None:
        since, why = self._refused_keys.get(routing_key, (0.0, ""))
        if why and monotonic() < since + REFUSED_KEY_SECONDS:
            return why
        self._refused_keys.pop(routing_key, None)
        return None

    async def _attempt(self, events: Sequence[OutboxEvent]) -> Published:
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
        failed = [result for result in results if type(result) is not spec.Basic.Ack]
        if any(isinstance(result, DeliveryError) for result in failed):
            self._channel.replace(channel)
        if lost := next((result for result in failed if isinstance(result, ChannelLostError)), None):
            reason = await why_closed(channel, within=REASON_SECONDS) or lost
            results = [reason if isinstance(result, ChannelLostError) else result for result in results]
            failed.append(reason)
        if refusal := next(filter(_is_about_one_event, failed), None):
            return await self._without_the_refused(events, results, one_line(refusal), refusal)
        return self._count(events, results)

    async def _without_the_refused(
        self, events: Sequence[OutboxEvent], results: Sequence[PublishResult], why: str, refusal: AMQPChannelError
    ) -> Published:
        """Publish *events* after the broker refused one of them: one half, then the other, each on a new channel."""
        # The broker stops at the refused event: what it confirmed comes before it.
        done = next((n for n, result in enumerate(results) if not isinstance(result, spec.Basic.Ack)), len(results))
        outcome = self._count(events[:done], results[:done])
        rest = events[done:]
        if len(rest) == 1:
            if isinstance(refusal, ChannelAccessRefused):
                self._refused_keys[rest[0].routing_key] = monotonic(), why
            log.warning("event refused", type=rest[0].type, routing_key=rest[0].routing_key, error=why)
            outcome.failure = outcome.failure or why
            outcome.refused[rest[0].key] = why
            return outcome
        middle = len(rest) // 2
        broken: set[RunKey] = set()
        for half in (rest[:middle], rest[middle:]):
            # A run whose earlier event failed is published again from that event on.
            found = await self._publish([event for event in half if event.key not in broken])
            broken = {event.key for event in half} - {event.key for event in found.confirmed} | set(found.refused)
            outcome.confirmed += found.confirmed
            outcome.failure = outcome.failure or found.failure
            outcome.refused |= found.refused
            if not found.confirmed and not found.refused:
                break  # not about one event: the broker is unavailable
        return outcome

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


def _is_about_one_event(error: object) -> TypeGuard[AMQPChannelError]:
    """Return whether the broker refused one message: its topic, or its size. Without the exchange all are refused."""
    if not isinstance(error, AMQPChannelError) or isinstance(error, ChannelNotFoundEntity):
        return False
    return not isinstance(error, ChannelAccessRefused) or "topic" in one_line(error)


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
