"""Publishing what waits in the outbox now, at an operator's word: what a relay does, to its end, with a report.

Beside live workers: a run that a relay holds is passed over, and a run's events keep their order. The events' ids make
it harmless where a worker publishes the same ones at the same moment.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.errors import UnavailableError
from consumer.outbox import store as outbox
from consumer.outbox.publisher import EventPublisher, Published
from consumer.outbox.relay import GRACE_SECONDS, RUNS_A_SWEEP, publish_stale
from domains.completions import EVENTS_PER_RUN, outbox_events
from domains.run import RunKey

# Seconds between two looks at events that are too young to be taken from their worker.
_LOOK_SECONDS = 0.5
# Reasons that are named; each batch has its own, and they are mostly the same.
_NAMED_REASONS = 5

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Drained:
    """What was published, how many runs could not be, how many still wait of those that were meant, and why."""

    runs: int = 0
    events: int = 0
    failed: int = 0
    left: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """Why something was not published; ``None`` if nothing failed."""
        return "; ".join(self.reasons) or None

    def count(self, found: int, outcome: Published) -> None:
        """Count a batch of *found* runs and what became of it."""
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
    """Publish and mark what had waited longer than *older_than_seconds* when it began; never raises for the broker.

    Without an age: all that was there when it began. What is younger than a relay's grace is its worker's to publish
    and is taken only when that time is over. *reachable* raises :class:`UnavailableError` if the broker takes nothing.
    """
    report = Drained()
    started = monotonic()
    newest = await _now(engine) - timedelta(seconds=older_than_seconds or 0)
    total = await _left(engine, newest)
    after: datetime | None = None
    while True:
        elapsed = monotonic() - started
        # The age grows with the work, so that what live workers commit meanwhile is not taken, and the work ends.
        age = max(GRACE_SECONDS, elapsed) if older_than_seconds is None else older_than_seconds + elapsed
        found, last, outcome = await _batch(engine, publisher, age, after)
        report.count(found, outcome)
        if progress is not None:
            progress(report.runs, max(total, report.runs))
        if outcome.failure:
            after = last  # what nobody takes must not keep the rest waiting
        away = outcome.failure and not outcome.confirmed and not await _answers(reachable)
        if found == RUNS_A_SWEEP and not away:
            continue
        report.left = await _left(engine, newest)
        patient = older_than_seconds is None and elapsed < GRACE_SECONDS + 1
        if away or not patient or report.left <= report.failed:
            return report
        await asyncio.sleep(_LOOK_SECONDS)


async def _batch(
    engine: AsyncEngine, publisher: EventPublisher, age: float, after: datetime | None
) -> tuple[int, datetime | None, Published]:
    async with engine.begin() as conn:
        found = list(await conn.execute(outbox.stale_runs(age, RUNS_A_SWEEP, after=after)))
        if not found:
            return 0, after, Published()
        keys = [RunKey(row.tenant_id, row.run_id) for row in found]
        outcome, _ = await publish_stale(conn, publisher, keys)
    return len(found), found[-1].created_at, outcome


async def _answers(reachable: Callable[[], Awaitable[object]]) -> bool:
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
    """Return how many runs wait whose events were staged by *newest*."""
    query = select(func.count()).where(outbox_events.c.sequence == EVENTS_PER_RUN, outbox_events.c.created_at <= newest)
    async with engine.connect() as conn:
        return int((await conn.execute(query)).scalar_one())
