"""Carries out settlements: ack, park, retry later, requeue. The order makes it safe: copy, confirm, ack."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import assert_never

import structlog
from aiormq.abc import DeliveredMessage

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.closeout.outcome import Failed, Outcome
from consumer.delivery.intake import Delivery
from consumer.delivery.settlement import Ack, Park, PauseAndRequeue, RetryLater, Settlement, settle
from consumer.errors import UnavailableError, one_line
from consumer.metrics import Metrics
from consumer.parked.copies import attempts_of, park, retry_later

log = structlog.get_logger(__name__)

# One log line per second under load, not one per message.
_REPORT_EVERY_SECONDS = 1.0


class Settler:
    """Settles each delivery on the channel it arrived on."""

    def __init__(self, *, channel: ConfirmedChannel, metrics: Metrics, max_attempts: int) -> None:
        self._channel = channel
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._unreported: Counter[str] = Counter()
        self._reported_at = float("-inf")
        self._cannot_publish = False
        self._report_due: asyncio.TimerHandle | None = None

    async def settle_all(self, outcomes: Sequence[tuple[Delivery, Outcome]]) -> str | None:
        """Settle each delivery by its outcome; return the reason to pause, or ``None``.

        A delivery whose channel closed cannot be settled. The broker redelivers it, and the claim finds its run.
        """
        pause_reason: str | None = None
        counts: Counter[str] = Counter()
        for delivery, outcome in outcomes:
            attempts = attempts_of(delivery.message)
            settlement = settle(outcome, attempts=attempts, max_attempts=self._max_attempts)
            try:
                counts[await self._carry_out(delivery, settlement, outcome)] += 1
                if isinstance(settlement, PauseAndRequeue):
                    pause_reason = pause_reason or settlement.why
            except UnavailableError as error:
                # Without a confirmed copy there is no ack: the delivery is requeued.
                self._cannot_publish = True
                pause_reason = pause_reason or one_line(error)
                await delivery.acks.requeue(delivery.tag)
                counts["requeued"] += 1
        for acks in {delivery.acks for delivery, _ in outcomes}:
            await acks.flush()
        for result, count in counts.items():
            self._metrics.deliveries.labels(result).inc(count)
        self._unreported.update(counts)
        if self._report_due is None:
            wait = self._reported_at + _REPORT_EVERY_SECONDS - monotonic()
            self._report_due = asyncio.get_running_loop().call_later(max(0.0, wait), self.report)
        return pause_reason

    async def ready(self) -> None:
        """Return if copies can be published; raise ``UnavailableError`` if the last one failed and the next would, too.

        Without this check a message that must be parked would be redelivered every second during an alarm.
        """
        if self._cannot_publish:
            await self._channel.opened()
            self._cannot_publish = False

    def report(self) -> None:
        """Log the settlements since the last report."""
        if self._unreported:
            log.info("deliveries settled", **self._unreported)
        self._unreported.clear()
        self._report_due = None
        self._reported_at = monotonic()

    async def _carry_out(self, delivery: Delivery, settlement: Settlement, outcome: Outcome) -> str:
        message = delivery.message
        match settlement:
            case Ack(result):
                delivery.acks.ack(delivery.tag)
                return result
            case Park(reason, error, attempts):
                await park(self._channel, message, reason=reason, error=error, attempts=attempts)
                delivery.acks.ack(delivery.tag)
                self._metrics.parked.labels(reason).inc()
                # The error may quote the message: it belongs in the parked copy's header, not in a log.
                log.warning("message parked", reason=reason, **_about(message))
                return "parked"
            case RetryLater(attempts, error):
                await retry_later(self._channel, message, attempts=attempts, error=error)
                delivery.acks.ack(delivery.tag)
                failure = outcome.error if isinstance(outcome, Failed) else None
                log.warning("run will be retried", attempts=attempts, exc_info=failure, **_about(message))
                return "retried"
            case PauseAndRequeue():
                await delivery.acks.requeue(delivery.tag)
                return "requeued"
            case _:
                assert_never(settlement)

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Count *deliveries* as requeued; closing their channel requeues them."""
        if deliveries:
            self._metrics.deliveries.labels("requeued").inc(len(deliveries))


def _about(message: DeliveredMessage) -> dict[str, object]:
    return {"message_id": message.header.properties.message_id, "body_bytes": len(message.body)}
