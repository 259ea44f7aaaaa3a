"""``closeout outbox drain``: relay sweeps until the outbox is empty, with a report.

Safe next to live workers: runs locked by a relay are skipped, and a run's events keep their order. If a worker
publishes the same events at the same time, their ids make the second copy harmless.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.errors import UnavailableError
from consumer.outbox.publisher import EventPublisher, Published
from consumer.outbox.relay import GRACE_SECONDS, RUNS_A_SWEEP, Stale, sweep_outbox
from consumer.wording import Progress
from domains.completions import EVENTS_PER_RUN, outbox_events

# Seconds between two polls for events that are still within their worker's grace period.
_POLL_SECONDS = 0.5
# Distinct failure reasons in the report; batches mostly fail for the same one.
_NAMED_REASONS = 5


@dataclass(slots=True)
class Drained:
    """The report: published runs and events, failed runs, runs of the selection still waiting, and the reasons."""

    runs: int = 0
    events: int = 0
    failed: int = 0
    left: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """The reasons for failures; ``None`` if nothing failed."""
        return "; ".join(self.reasons) or None

    def count(self, found: int, outcome: Published) -> None:
        """Add the outcome of a batch of *found* runs."""
        done = sum(event.sequence == EVENTS_PER_RUN for event in outcome.confirmed)
        self.runs += done
        self.events += len(outcome.confirmed)
        if outcome.failure:
            self.failed += found - done
            if outcome.failure not in self.reasons and len(self.reasons) < _NAMED_REASONS:
                self.reasons.append(outcome.failure)


async def drain(
    engine: AsyncEngine,
    publisher: EventPublisher,
    *,
    reachable: Callable[[], Awaitable[object]],
    older_than_seconds: float | None = None,
    progress: Progress | None = None,
) -> Drained:
    """Publish and mark the events older than *older_than_seconds* at the start; never raises for broker errors.

    Without an age, all events present at the start. Events within a relay's grace period belong to their worker, and
    are taken only after it. *reachable* raises :class:`UnavailableError` if the broker accepts nothing.
    """
    report = Drained()
    started = monotonic()
    newest = await _now(engine) - timedelta(seconds=older_than_seconds or 0)
    total = await _left(engine, newest)
    after: datetime | None = None
    while True:
        elapsed = monotonic() - started
        # The age grows with elapsed time, so that events committed meanwhile are not taken, and the drain ends.
        age = max(GRACE_SECONDS, elapsed) if older_than_seconds is None else older_than_seconds + elapsed
        swept = await sweep_outbox(engine, publisher, Stale(age, after, set_aside_too=True))
        outcome = swept.outcome
        report.count(swept.found, outcome)
        if progress is not None:
            progress(report.runs, max(total, report.runs))
        if outcome.failure:
            after = swept.last or after  # events that cannot be published must not block the rest
        away = outcome.failure and not outcome.confirmed and not await _is_reachable(reachable)
        if swept.found == RUNS_A_SWEEP and not away:
            continue
        report.left = await _left(engine, newest)
        patient = older_than_seconds is None and elapsed < GRACE_SECONDS + 1
        if away or not patient or report.left <= report.failed:
            return report
        await asyncio.sleep(_POLL_SECONDS)


async def _is_reachable(reachable: Callable[[], Awaitable[object]]) -> bool:
    try:
        await reachable()
    except UnavailableError:
        return False
    return True


async def _now(engine: AsyncEngine) -> datetime:
    async with engine.connect() as conn:
        now: datetime = (await conn.execute(select(func.clock_timestamp()))).scalar_one()
        return now


async def _left(engine: AsyncEngine, newest: datetime) -> int:
    """Return the number of runs in the outbox whose events were staged by *newest*."""
    query = select(func.count()).where(outbox_events.c.sequence == EVENTS_PER_RUN, outbox_events.c.created_at <= newest)
    async with engine.connect() as conn:
        return int((await conn.execute(query)).scalar_one())
