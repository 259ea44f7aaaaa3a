"""What waits in the outbox, and what that means: whose events, of which types, for how long."""

from dataclasses import dataclass, field
from enum import StrEnum

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.outbox.relay import GRACE_SECONDS, LONGEST_INTERVAL_SECONDS, RUNS_A_SWEEP
from domains.completions import EVENTS_PER_RUN

# Runs that are counted, oldest first: half a second's work for the database. Beyond it nobody needs the exact number.
COUNTED_RUNS = 100_000
# Seconds by which a relay that works has taken an event that its own worker left behind.
RELAYED_SECONDS = GRACE_SECONDS + LONGEST_INTERVAL_SECONDS
# Seconds after which something is wrong: the relay has had several turns.
STALE_SECONDS = 60.0


class State(StrEnum):
    """What the age of the oldest event says."""

    EMPTY = "empty"
    NORMAL = "normal"
    LATE = "late"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Share:
    """How many runs and events wait, of one tenant, of one type or of all; the age of the oldest is in seconds."""

    runs: int = 0
    events: int = 0
    oldest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the outbox holds. Counts stop at ``COUNTED_RUNS`` runs, the oldest ones; then ``complete`` is false."""

    all: Share = Share()
    by_tenant: dict[str, Share] = field(default_factory=dict)
    by_type: dict[str, Share] = field(default_factory=dict)
    complete: bool = True

    def state(self, stale_seconds: float = STALE_SECONDS) -> State:
        """Say what the age of the oldest event means."""
        if not self.all.events:
            return State.EMPTY
        if self.all.oldest_seconds >= stale_seconds:
            return State.STALE
        return State.NORMAL if self.all.oldest_seconds < RELAYED_SECONDS else State.LATE


# A run is found through its last event, which is there until all are gone; the index on those gives the oldest first.
# The limit is written out: for one that it does not know, PostgreSQL plans to read a tenth of the table.
_COUNT = f"""
    WITH waiting AS MATERIALIZED (
        SELECT tenant_id, run_id FROM governance.outbox_events
         WHERE sequence = {EVENTS_PER_RUN} ORDER BY created_at LIMIT AT_MOST)
    SELECT o.tenant_id, o.type, count(DISTINCT (o.tenant_id, o.run_id)) AS runs, count(*) AS events,
           greatest(extract(epoch FROM clock_timestamp() - min(o.created_at)), 0)::float8 AS oldest
      FROM waiting JOIN governance.outbox_events o USING (tenant_id, run_id)
     GROUP BY GROUPING SETS ((), (o.tenant_id), (o.type))
     ORDER BY min(o.created_at)
"""  # noqa: S608 - a constant of ours


async def waiting(conn: AsyncConnection, *, at_most: int = COUNTED_RUNS) -> Waiting:
    """Count what waits, tenants and types with the oldest events first, in one statement and so in one snapshot."""
    total, by_tenant, by_type = Share(), {}, {}
    for row in await conn.execute(text(_COUNT.replace("AT_MOST", str(at_most)))):
        share = Share(row.runs, row.events, round(row.oldest or 0.0, 3))
        if row.tenant_id is not None:
            by_tenant[row.tenant_id] = share
        elif row.type is not None:
            by_type[row.type] = share
        else:
            total = share
    return Waiting(total, by_tenant, by_type, complete=total.runs < at_most)


def in_words(state: State) -> tuple[str, str]:
    """Return what *state* means, and what to do about it; nothing to do is the empty string."""
    return _WORDS[state]


_NORMAL = (
    f"normal: events are here from the commit until their confirms; after {GRACE_SECONDS:.0f} s a relay takes them"
)
_LATE = f"late: a relay takes up to {RUNS_A_SWEEP} runs a sweep, every few seconds; after an outage it catches up"
_STALE = (
    "stale: no worker's relay runs or reaches RabbitMQ, or no queue takes the events (REQUIRE_EVENT_SUBSCRIBERS). "
    "Nothing is lost; subscribers have not heard of these runs"
)
_DRAIN = "closeout doctor says what is wrong; start a worker, or publish them now with closeout outbox drain"
_WORDS = {
    State.EMPTY: ("every event that was committed has been confirmed by RabbitMQ", ""),
    State.NORMAL: (_NORMAL, ""),
    State.LATE: (_LATE, "look again in a minute"),
    State.STALE: (_STALE, _DRAIN),
}
