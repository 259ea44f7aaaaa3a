"""The outbox: events that are committed and not yet confirmed. A row lives from the commit until its confirm."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.contract.events import OutboxEvent, trace_in
from consumer.phases import TransactionPhase
from domains.completions import EVENTS_PER_RUN, outbox_events, run_completions
from domains.database.statements import Compiled, columns_of, insert_many, unnest
from domains.run import RunKey

_EVENT = ("tenant_id", "run_id", "sequence", "event_id", "type", "routing_key", "body")
_INSERT = Compiled(insert_many(outbox_events, _EVENT))
_event_row = attrgetter(*_EVENT)

_KEYS = ("tenant_id", "run_id")
_runs = unnest(outbox_events, _KEYS)
_of_these_runs = (outbox_events.c.tenant_id == _runs.c.tenant_id) & (outbox_events.c.run_id == _runs.c.run_id)
_columns = [outbox_events.c[name] for name in _EVENT]
_UNPUBLISHED = Compiled(select(*_columns).join(_runs, _of_these_runs).order_by(*_columns[:3]))


def _mark_statement() -> Any:  # noqa: ANN401 - an UPDATE with a DELETE in its WITH
    """Delete the confirmed rows; a run whose last row goes has had all its events published."""
    confirmed = unnest(outbox_events, (*_KEYS, "sequence"))
    gone = (
        delete(outbox_events)
        .where(
            outbox_events.c.tenant_id == confirmed.c.tenant_id,
            outbox_events.c.run_id == confirmed.c.run_id,
            outbox_events.c.sequence == confirmed.c.sequence,
        )
        .returning(outbox_events.c.tenant_id, outbox_events.c.run_id, outbox_events.c.sequence)
        .cte("gone")
    )
    # The mark's own commit need not be on the disk before anybody goes on: a server that crashes and loses it finds the
    # rows in the outbox, and they go out again under their ids. It is written within three wal_writer_delays.
    unhurried = select(func.set_config("synchronous_commit", "off", True)).scalar_subquery()
    return (
        update(run_completions)
        .values(phase=TransactionPhase.EVENTS_PUBLISHED.value, events_published_at=func.clock_timestamp())
        .where(
            gone.c.sequence == EVENTS_PER_RUN,
            run_completions.c.tenant_id == gone.c.tenant_id,
            run_completions.c.run_id == gone.c.run_id,
            run_completions.c.phase == TransactionPhase.COMMITTED.value,
            unhurried.is_not(None),
        )
        .returning(run_completions.c.tenant_id, run_completions.c.run_id)
    )


_MARK = Compiled(_mark_statement())


async def stage(conn: AsyncConnection, events: Sequence[OutboxEvent]) -> None:
    """Write *events* into the outbox, in one statement. It leans on the claim in the same transaction."""
    await _INSERT.execute(conn, columns_of(_EVENT, map(_event_row, events)))


async def unpublished(conn: AsyncConnection, keys: Iterable[RunKey]) -> list[OutboxEvent]:
    """Return what the outbox still holds of the runs *keys*, in order within each run."""
    rows = await _UNPUBLISHED.execute(conn, columns_of(_KEYS, keys))
    named = (dict(zip(_EVENT, row, strict=True)) for row in rows)
    return [OutboxEvent(**row, trace=trace_in(row["body"])) for row in named]


async def mark(conn: AsyncConnection, confirmed: Sequence[OutboxEvent]) -> set[RunKey]:
    """Delete the *confirmed* events; return the runs whose last event that was, now EVENTS_PUBLISHED.

    Rows are named one by one, never by a range: a range would delete what committed in between. *confirmed* must be
    a prefix of each run's events, so that a run's last row going means that all of them went. One statement, which may
    be a transaction of its own (AUTOCOMMIT); whatever transaction it is in commits asynchronously.
    """
    rows = ((event.tenant_id, event.run_id, event.sequence) for event in confirmed)
    done = await _MARK.execute(conn, columns_of((*_KEYS, "sequence"), rows))
    return {RunKey(*row) for row in done}


def stale_runs(older_than_seconds: float, limit: int, *, after: datetime | None = None) -> Select[Any]:
    """Select the runs whose events have waited longer than *older_than_seconds*, oldest first, locking each.

    Rows are tenant, run and the time they were staged, all later than *after*. A run is locked through its last
    event's row, which is there until all are gone; a run that another relay holds is passed over.
    """
    waited = func.make_interval(0, 0, 0, 0, 0, 0, older_than_seconds, type_=INTERVAL)
    created_at = outbox_events.c.created_at
    query = (
        select(outbox_events.c.tenant_id, outbox_events.c.run_id, created_at)
        # now(), not clock_timestamp(): a volatile function would keep the index from being used.
        .where(outbox_events.c.sequence == EVENTS_PER_RUN, created_at < func.now() - waited)
        .order_by(created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return query if after is None else query.where(created_at > after)
