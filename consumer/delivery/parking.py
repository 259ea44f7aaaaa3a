"""Parks messages; while the parked queue refuses them, delays them, so that all others are closed out meanwhile.

The reasons are ``ParkReason`` in ``consumer/contract/refusals.py``; ``settlement.py`` chooses one.
"""

from time import monotonic

import structlog
from aiormq.abc import DeliveredMessage

from consumer.amqp.confirmed_channel import ConfirmedChannel, RefusedError
from consumer.delivery.settlement import Park
from consumer.errors import one_line
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.parked.copies import attempts_of, park, retry_later

log = structlog.get_logger(__name__)

# Seconds between two attempts at a parked queue that refuses: each takes a round trip, and a new channel after it.
_PROBE_SECONDS = 5.0


class Parking:
    """Publishes copies to the parked queue, and remembers whether it refuses them."""

    def __init__(self, *, channel: ConfirmedChannel, metrics: Metrics, health: Health) -> None:
        self._channel = channel
        self._metrics = metrics
        self._health = health
        self._refusal = ""
        self._next_attempt = float("-inf")

    async def park(self, message: DeliveredMessage, settlement: Park) -> bool:
        """Return true once *message* is parked, and false once it is in the retry queue instead.

        Raises ``RefusedError`` if neither queue accepts it, and ``UnavailableError`` if the broker is unavailable.
        """
        reason, error = settlement.reason, settlement.error
        if monotonic() >= self._next_attempt:
            try:
                await park(self._channel, message, reason=reason, error=error, attempts=settlement.attempts)
            except RefusedError as refusal:
                self._refused(one_line(refusal))
            else:
                self._accepted()
                return True
        await retry_later(
            self._channel,
            message,
            # Not counted: a delay is not an attempt.
            attempts=attempts_of(message),
            error=f"cannot be parked ({self._refusal}): {error}",
            # The worker's own user is trusted; a message must not become trusted by waiting.
            trusted=reason != "untrusted_publisher",
        )
        return False

    def _refused(self, why: str) -> None:
        self._next_attempt = monotonic() + _PROBE_SECONDS
        if not self._refusal:
            log.warning("the parked queue refuses messages; they are delayed", error=why)
        self._refusal = why
        self._health.parking_refused = why
        self._metrics.parking_refused.set(1)

    def _accepted(self) -> None:
        if self._refusal:
            log.info("the parked queue accepts messages again")
            self._refusal = ""
            self._health.parking_refused = None
            self._metrics.parking_refused.set(0)
