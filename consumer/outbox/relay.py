"""The relay: publishes events that a crash, a restart or a broker alarm left in the outbox.

It runs in every worker. Relays do not conflict: each locks the runs it takes and skips locked ones. The locks of a
crashed worker end with its connection.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from time import monotonic

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.errors import UnavailableError, one_line
from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.outbox.publisher import EventPublisher, Published
from consumer.phases import TransactionPhase
from domains.run import RunKey

log = structlog.get_logger(__name__)

# Seconds reserved for the fast path. Longer than the confirm timeout, or a slow publish would be repeated.
GRACE_SECONDS = 11.0
# Seconds between two sweeps. A crashed worker's events wait at most grace plus interval: 13 s.
INTERVAL_SECONDS = 2.0
LONGEST_INTERVAL_SECONDS = 5.0
# Runs per sweep: 600 events are confirmed well within the time a lock may be held.
RUNS_A_SWEEP = 200


async def publish_stale(
    conn: AsyncConnection, publisher: EventPublisher, keys: Sequence[RunKey]
) -> tuple[Published, set[RunKey]]:
    """Publish and mark the events of *keys*, locked by *conn*'s transaction; return the outcome and the finished runs.

    Runs with an event that cannot be published are set aside, so that they do not delay the others.
    The lock is held while waiting for confirms, which their timeout bounds; never over a pause.
    """
    found = await outbox.unpublished(conn, keys)
    outcome = await publisher.publish(found.events)
    outcome.refused |= found.unreadable
    outcome.failure = outcome.failure or next(iter(found.unreadable.values()), None)
    done = await outbox.mark(conn, outcome.confirmed) if outcome.confirmed else set()
    if outcome.refused:
        await outbox.set_aside(conn, outcome.refused)
        log.warning("events set aside", runs=len(outcome.refused), error=outcome.failure)
    return outcome, done


class Relay:
    """Publishes and marks events that are older than the grace period."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        publisher: EventPublisher,
        metrics: Metrics,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._metrics = metrics
        self._grace = grace_seconds
        self._failures = 0
        self._after: datetime | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """Sweep until *stopping* is set; back off while nothing can be published."""
        while not stopping.is_set():
            pause = INTERVAL_SECONDS
            try:
                if await self.sweep() == RUNS_A_SWEEP:
                    pause = 0.0
                self._failures = 0
            except Exception as error:  # noqa: BLE001 - any error is treated as an outage: back off and retry
                self._failures += 1
                pause = min(INTERVAL_SECONDS * 2**self._failures, LONGEST_INTERVAL_SECONDS)
                log.warning("relay backing off", seconds=pause, error=one_line(error))
            try:
                await asyncio.wait_for(stopping.wait(), pause)
            except TimeoutError:
                continue

    async def sweep(self) -> int:
        """Publish the stale events of up to ``RUNS_A_SWEEP`` runs; return the number of runs found."""
        started = monotonic()
        async with self._engine.begin() as conn:
            found = list(await conn.execute(outbox.stale_runs(self._grace, RUNS_A_SWEEP, after=self._after)))
            keys = [RunKey(row.tenant_id, row.run_id) for row in found]
            # Events that cannot be published must not block later ones: continue behind them, then start over.
            self._after = found[-1].created_at if len(found) == RUNS_A_SWEEP else None
            if not keys:
                return 0
            outcome, done = await publish_stale(conn, self._publisher, keys)
        self._metrics.phase_entered.labels(TransactionPhase.EVENTS_PUBLISHED.value).inc(len(done))
        log.info(
            "relay published stale events",
            runs=len(done), of=len(keys), seconds=round(monotonic() - started, 3), error=outcome.failure,
        )  # fmt: skip
        if outcome.failure and not outcome.confirmed and not outcome.refused:
            raise UnavailableError(outcome.failure)
        return len(keys)
