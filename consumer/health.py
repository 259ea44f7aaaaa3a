"""The worker's readiness, as reported by /readyz."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from consumer.metrics import Metrics


@dataclass(slots=True)
class Health:
    """Ready means that deliveries can arrive, not that a socket is open. Otherwise: the reason, and since when."""

    metrics: Metrics
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    reason: str | None = "starting"
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    # The reason why the parked queue refuses messages. The worker continues to consume.
    parking_refused: str | None = None
    # The intake queues that the worker cannot consume while it consumes others, each with the reason.
    unavailable_queues: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A worker that crashes repeatedly before it consumes must not look like one that consumes.
        self.metrics.paused.set(1)

    def consuming(self) -> None:
        """Record that a consumer is registered and the database is available."""
        self._change(None)

    def paused(self, reason: str) -> None:
        """Record why consuming stopped; ``since`` keeps the time of the first of several reasons in a row."""
        self._change(reason)

    @property
    def warning(self) -> str | None:
        """Return what does not work although the worker consumes."""
        found = [
            f"{queue} is not consumed, all other queues are: {why}" for queue, why in self.unavailable_queues.items()
        ]
        if self.parking_refused:
            found.insert(0, f"messages cannot be parked and are delayed: {self.parking_refused}")
        return "; ".join(found) or None

    def _change(self, reason: str | None) -> None:
        if (reason is None) != (self.reason is None):
            self.since = self.clock()
        self.reason = reason
        self.metrics.paused.set(reason is not None)

    @property
    def is_ready(self) -> bool:
        """Return whether the worker consumes."""
        return self.reason is None
