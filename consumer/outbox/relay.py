"""The relay: publishes events that a crash, a restart or a broker alarm left in the outbox.

It runs in every worker. Relays do not conflict: each locks the runs it takes and skips locked ones. The locks of a
crashed worker end with its connection.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.errors import UnavailableError, one_line
from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.outbox.publisher import EventPublisher, Published
from consumer.phases import TransactionPhase
from domains.database.statements import on_citus
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
    if not keys:
        return Published(), set()
    found = await outbox.unpublished(conn, keys)
    outcome = await publisher.publish(found.events)
    outcome.refused |= found.unreadable
    outcome.failure = outcome.failure or next(iter(found.unreadable.values()), None)
    done = await outbox.mark(conn, outcome.confirmed) if outcome.confirmed else set()
    if outcome.refused:
        await outbox.set_aside(conn, outcome.refused)
        log.warning("events set aside", runs=len(outcome.refused), error=outcome.failure)
    return outcome, done


class Stale(NamedTuple):
    """Which runs to publish: those whose events are older than this many seconds, and were staged later than *after*.

    Runs that are set aside are included only with *set_aside_too*.
    """

    older_than_seconds: float
    after: datetime | None = None
    set_aside_too: bool = False


@dataclass(slots=True)
class Swept:
    """The result of a sweep: how many runs it found, when the last was staged, the outcome, and the finished runs."""

    found: int = 0
    last: datetime | None = None
    outcome: Published = field(default_factory=Published)
    done: set[RunKey] = field(default_factory=set)


async def sweep_outbox(engine: AsyncEngine, publisher: EventPublisher, stale: Stale) -> Swept:
    """Publish and mark the events of up to ``RUNS_A_SWEEP`` runs, in one transaction; on Citus in one per tenant."""
    async with engine.begin() as conn:
        by_tenant = on_citus(conn)
        query = outbox.stale_runs(
            stale.older_than_seconds,
            RUNS_A_SWEEP,
            after=stale.after,
            set_aside_too=stale.set_aside_too,
            locked=not by_tenant,
        )
        found = list(await conn.execute(query))
        if not found:
            return Swept()
        swept = Swept(len(found), found[-1].created_at)
        if not by_tenant:
            keys = [RunKey(row.tenant_id, row.run_id) for row in found]
            swept.outcome, swept.done = await publish_stale(conn, publisher, keys)
    if by_tenant:
        tenants: dict[str, list[UUID]] = {}
        for row in found:
            tenants.setdefault(row.tenant_id, []).append(row.run_id)
        for tenant_id, run_ids in tenants.items():
            async with engine.begin() as conn:
                outcome, done = await publish_stale(conn, publisher, await outbox.lock_runs(conn, tenant_id, run_ids))
            swept.outcome.add(outcome)
            swept.done |= done
    return swept


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
        swept = await sweep_outbox(self._engine, self._publisher, Stale(self._grace, self._after))
        # Events that cannot be published must not block later ones: continue behind them, then start over.
        self._after = swept.last if swept.found == RUNS_A_SWEEP else None
        if not swept.found:
            return 0
        outcome = swept.outcome
        self._metrics.phase_entered.labels(TransactionPhase.EVENTS_PUBLISHED.value).inc(len(swept.done))
        log.info(
            "relay published stale events",
            runs=len(swept.done), of=swept.found, seconds=round(monotonic() - started, 3), error=outcome.failure,
        )  # fmt: skip
        if outcome.failure and not outcome.confirmed and not outcome.refused:
            raise UnavailableError(outcome.failure)
        return swept.found
