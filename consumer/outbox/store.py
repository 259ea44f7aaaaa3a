"""The outbox table: a row exists from the commit of an event until RabbitMQ confirms it."""

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
    """Delete the confirmed rows; a run whose last row is deleted has all its events published."""
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
    # The mark may commit asynchronously: if a server crash loses it, the rows are still in the outbox and the events
    # are published again under their ids. It reaches the disk within three times wal_writer_delay.
    asynchronously = select(func.set_config("synchronous_commit", "off", True)).scalar_subquery()
    return (
        update(run_completions)
        .values(phase=TransactionPhase.EVENTS_PUBLISHED.value, events_published_at=func.clock_timestamp())
        .where(
            gone.c.sequence == EVENTS_PER_RUN,
            run_completions.c.tenant_id == gone.c.tenant_id,
            run_completions.c.run_id == gone.c.run_id,
            run_completions.c.phase == TransactionPhase.COMMITTED.value,
            asynchronously.is_not(None),
        )
        .returning(run_completions.c.tenant_id, run_completions.c.run_id)
    )


_MARK = Compiled(_mark_statement())


async def stage(conn: AsyncConnection, events: Sequence[OutboxEvent]) -> None:
    """Write *events* into the outbox in one statement. Leans on the claim in the same transaction."""
    await _INSERT.execute(conn, columns_of(_EVENT, map(_event_row, events)))


async def unpublished(conn: AsyncConnection, keys: Iterable[RunKey]) -> list[OutboxEvent]:
    """Return the events of *keys* that are still in the outbox, in order within each run."""
    rows = await _UNPUBLISHED.execute(conn, columns_of(_KEYS, keys))
    named = (dict(zip(_EVENT, row, strict=True)) for row in rows)
    return [OutboxEvent(**row, trace=trace_in(row["body"])) for row in named]


async def mark(conn: AsyncConnection, confirmed: Sequence[OutboxEvent]) -> set[RunKey]:
    """Delete the *confirmed* events; return the runs that are now EVENTS_PUBLISHED.

    Rows are deleted by explicit id, never by a range, which would include rows committed meanwhile. *confirmed* must be
    a prefix of each run's events: a deleted last row then means that all are published. One statement; the transaction
    it runs in (with AUTOCOMMIT its own) commits asynchronously.
    """
    rows = ((event.tenant_id, event.run_id, event.sequence) for event in confirmed)
    done = await _MARK.execute(conn, columns_of((*_KEYS, "sequence"), rows))
    return {RunKey(*row) for row in done}


def stale_runs(older_than_seconds: float, limit: int, *, after: datetime | None = None) -> Select[Any]:
    """Select and lock the runs whose events are older than *older_than_seconds*, oldest first.

    Rows are tenant, run and the time they were staged, later than *after*. A run is locked through its last event's
    row, which exists until all are published; runs locked by another relay are skipped.
    """
    waited = func.make_interval(0, 0, 0, 0, 0, 0, older_than_seconds, type_=INTERVAL)
    created_at = outbox_events.c.created_at
    query = (
        select(outbox_events.c.tenant_id, outbox_events.c.run_id, created_at)
        # now(), not clock_timestamp(): a volatile function would prevent the use of the index.
        .where(outbox_events.c.sequence == EVENTS_PER_RUN, created_at < func.now() - waited)
        .order_by(created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return query if after is None else query.where(created_at > after)
