"""Carries out settlements: ack, park, retry later, requeue. The order makes it safe: copy, confirm, ack."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import assert_never

import structlog
from aiormq.abc import DeliveredMessage

from consumer.amqp.confirmed_channel import ConfirmedChannel, RefusedError
from consumer.closeout.outcome import Failed, Outcome
from consumer.delivery.intake import Delivery
from consumer.delivery.parking import Parking
from consumer.delivery.settlement import Ack, Park, PauseAndRequeue, RetryLater, settle
from consumer.errors import UnavailableError, one_line
from consumer.metrics import Metrics
from consumer.parked.copies import attempts_of, retry_later

log = structlog.get_logger(__name__)

# One log line per second under load, not one per message.
_REPORT_EVERY_SECONDS = 1.0
# Seconds until a delivery is requeued whose copy both the parked and the retry queue refuse.
_HOLD_SECONDS = 10.0


class Settler:
    """Settles each delivery on the channel it arrived on."""

    def __init__(
        self, *, channel: ConfirmedChannel, parking: Parking, metrics: Metrics, max_attempts: int, held_max: int
    ) -> None:
        """*held_max*: how many deliveries may be held whose copy no queue accepts, less than the prefetch count."""
        self._channel = channel
        self._parking = parking
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._unreported: Counter[str] = Counter()
        self._reported_at = float("-inf")
        self._cannot_publish = False
        self._report_due: asyncio.TimerHandle | None = None
        self._held: set[asyncio.Task[None]] = set()
        self._held_max = held_max
        self._refusal = ""
        self._refused_until = float("-inf")

    async def settle_all(self, outcomes: Sequence[tuple[Delivery, Outcome]]) -> str | None:
        """Settle each delivery by its outcome; return the reason to pause, or ``None``.

        A delivery whose channel closed cannot be settled. The broker redelivers it, and the claim finds its run.
        """
        pause_reason: str | None = None
        counts: Counter[str] = Counter()
        copies: list[tuple[Delivery, Park | RetryLater, Outcome]] = []
        for delivery, outcome in outcomes:
            attempts = attempts_of(delivery.message)
            match settlement := settle(outcome, attempts=attempts, max_attempts=self._max_attempts):
                case Ack(result):
                    delivery.acks.ack(delivery.tag)
                    counts[result] += 1
                case PauseAndRequeue(why):
                    pause_reason = pause_reason or why
                    await delivery.acks.requeue(delivery.tag)
                    counts["requeued"] += 1
                case Park() | RetryLater():
                    copies.append((delivery, settlement, outcome))
                case _:
                    assert_never(settlement)
        if copies:
            # Acks first, and the copies together: each copy takes a round trip.
            await self._flush(outcomes)
            for copied, unavailable in await self._copy_all(copies):
                counts[copied] += 1
                pause_reason = pause_reason or unavailable
        await self._flush(outcomes)
        for settled, count in counts.items():
            self._metrics.deliveries.labels(settled).inc(count)
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

    async def _flush(self, outcomes: Sequence[tuple[Delivery, Outcome]]) -> None:
        for acks in {delivery.acks for delivery, _ in outcomes}:
            await acks.flush()

    async def _copy_all(
        self, copies: Sequence[tuple[Delivery, Park | RetryLater, Outcome]]
    ) -> list[tuple[str, str | None]]:
        # The first alone: a refusal may close the channel, and what others write to it then closes the connection.
        results = [await self._copy(*copies[0])]
        if unavailable := results[0][1]:
            # Each would wait for its confirm in vain.
            for delivery, _, _ in copies[1:]:
                await delivery.acks.requeue(delivery.tag)
            return results + [("requeued", unavailable)] * (len(copies) - 1)
        if results[0][0] == "requeued":
            return results + [await self._copy(*copy) for copy in copies[1:]]
        return results + await asyncio.gather(*(self._copy(*copy) for copy in copies[1:]))

    async def _copy(
        self, delivery: Delivery, settlement: Park | RetryLater, outcome: Outcome
    ) -> tuple[str, str | None]:
        """Publish a copy and ack the delivery; return the result, and the reason to pause if the broker is away.

        Without a confirmed copy there is no ack.
        """
        if monotonic() < self._refused_until:
            return "requeued", await self._hold(delivery, self._refusal)
        try:
            result = await self._copied(delivery.message, settlement, outcome)
        except RefusedError as error:
            self._refusal, self._refused_until = one_line(error), monotonic() + _HOLD_SECONDS / 2
            return "requeued", await self._hold(delivery, self._refusal)
        except UnavailableError as error:
            self._cannot_publish = True
            await delivery.acks.requeue(delivery.tag)
            return "requeued", one_line(error)
        delivery.acks.ack(delivery.tag)
        return result, None

    async def _copied(self, message: DeliveredMessage, settlement: Park | RetryLater, outcome: Outcome) -> str:
        match settlement:
            case Park(reason):
                if not await self._parking.park(message, settlement):
                    return "retried"
                self._metrics.parked.labels(reason).inc()
                # The error may quote the message: it belongs in the parked copy's header, not in a log.
                log.warning("message parked", reason=reason, **_about(message))
                return "parked"
            case RetryLater(attempts, error):
                await retry_later(self._channel, message, attempts=attempts, error=error)
                failure = outcome.error if isinstance(outcome, Failed) else None
                log.warning("run will be retried", attempts=attempts, exc_info=failure, **_about(message))
                return "retried"
            case _:
                assert_never(settlement)

    async def _hold(self, delivery: Delivery, why: str) -> str | None:
        """Requeue *delivery* later: no queue accepts its copy, and at once it would only come back first.

        Returns the reason to pause if too many are held: they take the places of others.
        """
        if len(self._held) >= self._held_max:
            await delivery.acks.requeue(delivery.tag)
            return why
        if not self._held:
            log.warning("no queue accepts a copy; deliveries are held", seconds=_HOLD_SECONDS, error=why)

        async def requeue() -> None:
            await asyncio.sleep(_HOLD_SECONDS)
            await delivery.acks.requeue(delivery.tag)

        held = asyncio.get_running_loop().create_task(requeue())
        self._held.add(held)
        held.add_done_callback(self._held.discard)
        return None

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Count *deliveries* as requeued; closing their channel requeues them."""
        if deliveries:
            self._metrics.deliveries.labels("requeued").inc(len(deliveries))


def _about(message: DeliveredMessage) -> dict[str, object]:
    return {"message_id": message.header.properties.message_id, "body_bytes": len(message.body)}
