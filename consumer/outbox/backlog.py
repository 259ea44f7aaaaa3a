"""Outbox backlog statistics: a cheap count for the gauges and the console, and a full one by tenant and type."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from math import nan
from typing import NamedTuple

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.metrics import Metrics
from consumer.outbox.relay import GRACE_SECONDS, LONGEST_INTERVAL_SECONDS, RUNS_A_SWEEP
from consumer.postgres.engine import DATABASE_ERRORS
from domains.completions import EVENTS_PER_RUN, outbox_events

# Seconds. A scrape comes every 15 or 30; the query reads one index, at most PENDING_RUNS_MAX entries of it.
POLL_SECONDS = 5.0
PENDING_RUNS_MAX = 10_000
# Runs in the full count, oldest first: half a second of the database's time. Beyond that an exact number has no use.
COUNTED_RUNS_MAX = 100_000
# Seconds within which a healthy relay has taken an event that its own worker did not publish.
RELAYED_SECONDS = GRACE_SECONDS + LONGEST_INTERVAL_SECONDS
# Seconds after which something is wrong: the relay has had several sweeps.
STALE_SECONDS = 60.0


class Pending(NamedTuple):
    """How many runs have events in the outbox, counted up to ``PENDING_RUNS_MAX``; the age of the oldest in seconds.

    Runs that are set aside count, but not for the age.
    """

    runs: int
    oldest_seconds: float
    set_aside: int = 0

    @property
    def is_cut(self) -> bool:
        """Return whether there may be more runs than were counted."""
        return self.runs >= PENDING_RUNS_MAX


async def count_pending(conn: AsyncConnection) -> Pending:
    """Return how many runs have unpublished events, and the age of the oldest."""
    last = (
        select(outbox_events.c.created_at, outbox_events.c.set_aside_until)
        .where(outbox_events.c.sequence == EVENTS_PER_RUN)
        .order_by(outbox_events.c.created_at)
        .limit(PENDING_RUNS_MAX)
        .subquery()
    )
    oldest = func.min(last.c.created_at).filter(last.c.set_aside_until.is_(None))
    age = func.coalesce(func.extract("epoch", func.clock_timestamp() - oldest), 0)
    query = select(func.count(), age, func.count(last.c.set_aside_until)).select_from(last)
    count, seconds, set_aside = (await conn.execute(query)).one()
    return Pending(count, max(float(seconds), 0.0), set_aside)


async def watch_pending(
    stopping: asyncio.Event, *, engine: AsyncEngine, metrics: Metrics, every: float = POLL_SECONDS
) -> None:
    """Keep the outbox gauges current until *stopping* is set; they are NaN while the database is unavailable.

    A value from before an outage would pass for a current one. The relay cannot set them: while the broker confirms
    nothing, it does not complete a sweep.
    """
    while not stopping.is_set():
        runs, oldest, set_aside = nan, nan, nan
        with suppress(*DATABASE_ERRORS):
            async with engine.connect() as conn:
                runs, oldest, set_aside = await count_pending(conn)
        metrics.outbox_pending.set(runs)
        metrics.outbox_oldest.set(oldest)
        metrics.outbox_set_aside.set(set_aside)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), every)


class BacklogState(StrEnum):
    """Classification of the oldest event's age."""

    EMPTY = "empty"
    NORMAL = "normal"
    LATE = "late"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Share:
    """Unpublished runs and events of one tenant, of one type or of all; the age of the oldest in seconds."""

    runs: int = 0
    events: int = 0
    oldest_seconds: float = 0.0

    def plus(self, runs: int, events: int, oldest_seconds: float) -> "Share":
        """Return this share with others added."""
        return Share(self.runs + runs, self.events + events, max(self.oldest_seconds, oldest_seconds))


@dataclass(frozen=True, slots=True)
class Backlog:
    """The outbox by tenant and type. Counts stop at ``COUNTED_RUNS_MAX`` runs; ``complete`` is then false.

    ``set_aside`` has the runs that could not be published, by reason; the other counts leave them out.
    """

    all: Share = Share()
    by_tenant: dict[str, Share] = field(default_factory=dict)
    by_type: dict[str, Share] = field(default_factory=dict)
    complete: bool = True
    set_aside: dict[str, int] = field(default_factory=dict)

    def state(self, stale_seconds: float = STALE_SECONDS) -> BacklogState:
        """Return what the age of the oldest event means."""
        if not self.all.events:
            return BacklogState.EMPTY
        if self.all.oldest_seconds >= stale_seconds:
            return BacklogState.STALE
        return BacklogState.NORMAL if self.all.oldest_seconds < RELAYED_SECONDS else BacklogState.LATE


# A run is found through its last event, which stays until all are published; the index on those is in order of age.
# The limit is a literal: for a parameter PostgreSQL plans to read a tenth of the table.
_COUNT = f"""
    WITH waiting AS MATERIALIZED (
        SELECT tenant_id, run_id FROM governance.outbox_events
         WHERE sequence = {EVENTS_PER_RUN} AND set_aside_until IS NULL ORDER BY created_at LIMIT AT_MOST)
    SELECT o.tenant_id, o.type, count(*) FILTER (WHERE o.sequence = {EVENTS_PER_RUN}) AS last_events,
           count(DISTINCT o.run_id) AS runs, count(*) AS events,
           greatest(extract(epoch FROM statement_timestamp() - min(o.created_at)), 0)::float8 AS oldest
      FROM waiting JOIN governance.outbox_events o USING (tenant_id, run_id)
     GROUP BY o.tenant_id, o.type
"""  # noqa: S608 - a constant of ours

_SET_ASIDE = """
    SELECT set_aside_reason, count(*) AS runs FROM governance.outbox_events
     WHERE set_aside_until IS NOT NULL GROUP BY set_aside_reason ORDER BY runs DESC, set_aside_reason
"""


async def read_backlog(conn: AsyncConnection, *, at_most: int = COUNTED_RUNS_MAX) -> Backlog:
    """Count the outbox by tenant and type, those with the oldest events first, in one statement and one snapshot."""
    total, by_tenant, by_type = Share(), dict[str, Share](), dict[str, Share]()
    rows = await conn.execute(text(_COUNT.replace("AT_MOST", str(at_most))))
    for row in sorted(rows, key=lambda row: (-row.oldest, row.tenant_id, row.type)):
        oldest = round(row.oldest, 3)
        # Each run has one last event, of whatever type; a run is counted once for each type.
        total = total.plus(row.last_events, row.events, oldest)
        by_tenant[row.tenant_id] = by_tenant.get(row.tenant_id, Share()).plus(row.last_events, row.events, oldest)
        by_type[row.type] = by_type.get(row.type, Share()).plus(row.runs, row.events, oldest)
    set_aside = {row.set_aside_reason: row.runs for row in await conn.execute(text(_SET_ASIDE))}
    return Backlog(total, by_tenant, by_type, complete=total.runs < at_most, set_aside=set_aside)


def describe_backlog(state: BacklogState) -> tuple[str, str]:
    """Return what *state* means, and what to do about it; an empty string if nothing is to be done."""
    return _DESCRIPTIONS[state]


def describe_set_aside() -> str:
    """Return what to do about events that are set aside."""
    return (
        "fix the cause. The relay tries these events again every minute; closeout outbox drain tries them now. Other "
        "runs' events are published meanwhile"
    )


_DESCRIPTIONS = {
    BacklogState.EMPTY: ("RabbitMQ has confirmed every committed event", ""),
    BacklogState.NORMAL: (
        f"normal: events stay here from commit to confirm; after {GRACE_SECONDS:.0f} s a relay publishes them",
        "",
    ),
    BacklogState.LATE: (
        f"late: after an outage a relay publishes up to {RUNS_A_SWEEP} runs per sweep, one sweep every few seconds",
        "check again in a minute",
    ),
    BacklogState.STALE: (
        (
            "stale: no relay is running or can reach RabbitMQ, or no queue accepts the events "
            "(REQUIRE_EVENT_SUBSCRIBERS). Nothing is lost, but subscribers have not received these events"
        ),
        "run closeout doctor for the cause; start a worker, or publish the events now with closeout outbox drain",
    ),
}
