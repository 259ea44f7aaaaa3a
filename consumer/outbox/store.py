"""The outbox table: a row exists from the commit of an event until RabbitMQ confirms it."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import ColumnElement, Select, case, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.contract.events import OutboxEvent, trace_in
from consumer.phases import TransactionPhase
from domains.completions import EVENT_MAX_BYTES, EVENTS_PER_RUN, outbox_events, run_completions
from domains.database.statements import Compiled, columns_of, insert_many, insert_row, of_given_tenants, unnest
from domains.run import RunKey

_EVENT = ("tenant_id", "run_id", "sequence", "event_id", "type", "routing_key", "body")
_INSERT = Compiled(insert_many(outbox_events, _EVENT), on_citus=insert_row(outbox_events, _EVENT))
_event_row = attrgetter(*_EVENT)

_KEYS = ("tenant_id", "run_id")
_runs = unnest(outbox_events, _KEYS)
_of_these_runs = (outbox_events.c.tenant_id == _runs.c.tenant_id) & (outbox_events.c.run_id == _runs.c.run_id)
# Bytes of bodies that are read at once. The rest of the runs is read by the next sweep.
_READ_MAX_BYTES = 4 * EVENT_MAX_BYTES
# Bytes of a routing key or type: AMQP's short string.
_SHORT_MAX_BYTES = 255
# Seconds until an event that was set aside is tried again.
SET_ASIDE_SECONDS = 60.0


def _unpublished_statement(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Read no body above the limit, and not more than the limit together: PostgreSQL knows a value's size unread."""
    size = func.octet_length(outbox_events.c.body)
    order = [outbox_events.c[name] for name in (*_KEYS, "sequence")]
    read = case((size <= EVENT_MAX_BYTES, size), else_=0)
    columns = [outbox_events.c[name] for name in _EVENT if name != "body"]
    body = case((size <= EVENT_MAX_BYTES, outbox_events.c.body)).label("body")
    sized = (
        select(*columns, body, size.label("size"), func.sum(read).over(order_by=order).label("upto"))
        .join(_runs, _of_these_runs)
        .where(*conditions)
        .subquery()
    )
    found = [sized.c[name] for name in (*_EVENT, "size")]
    return select(*found).where(sized.c.upto <= _READ_MAX_BYTES).order_by(*(sized.c[c.name] for c in order))


_UNPUBLISHED = Compiled(_unpublished_statement(), on_citus=_unpublished_statement(of_given_tenants(outbox_events)))


class Unpublished(NamedTuple):
    """Events to publish, and the runs with an event that no message can hold, each with the reason."""

    events: list[OutboxEvent]
    unreadable: dict[RunKey, str]


def _mark_statement(*, citus: bool = False) -> Any:  # noqa: ANN401 - an UPDATE with a DELETE in its WITH
    """Delete the confirmed rows; a run whose last row is deleted has all its events published.

    Citus refuses volatile functions in an UPDATE, so that there the commit is synchronous.
    """
    confirmed = unnest(outbox_events, (*_KEYS, "sequence"))
    gone = (
        delete(outbox_events)
        .where(
            outbox_events.c.tenant_id == confirmed.c.tenant_id,
            outbox_events.c.run_id == confirmed.c.run_id,
            outbox_events.c.sequence == confirmed.c.sequence,
            *([of_given_tenants(outbox_events)] if citus else []),
        )
        .returning(outbox_events.c.tenant_id, outbox_events.c.run_id, outbox_events.c.sequence)
        .cte("gone")
    )
    # The mark may commit asynchronously: if a server crash loses it, the rows are still in the outbox and the events
    # are published again under their ids. It reaches the disk within three times wal_writer_delay.
    asynchronously = select(func.set_config("synchronous_commit", "off", True)).scalar_subquery()
    return (
        update(run_completions)
        .values(
            phase=TransactionPhase.EVENTS_PUBLISHED.value,
            events_published_at=func.statement_timestamp() if citus else func.clock_timestamp(),
        )
        .where(
            gone.c.sequence == EVENTS_PER_RUN,
            run_completions.c.tenant_id == gone.c.tenant_id,
            run_completions.c.run_id == gone.c.run_id,
            run_completions.c.phase == TransactionPhase.COMMITTED.value,
            of_given_tenants(run_completions) if citus else asynchronously.is_not(None),
        )
        .returning(run_completions.c.tenant_id, run_completions.c.run_id)
    )


_MARK = Compiled(_mark_statement(), on_citus=_mark_statement(citus=True))


async def stage(conn: AsyncConnection, events: Sequence[OutboxEvent]) -> None:
    """Write *events* into the outbox in one statement. Leans on the claim in the same transaction."""
    await _INSERT.execute(conn, columns_of(_EVENT, map(_event_row, events)))


async def unpublished(conn: AsyncConnection, keys: Iterable[RunKey]) -> Unpublished:
    """Return the events of *keys* that are still in the outbox, in order within each run.

    At most 64 MiB of bodies: a later call returns the rest. None of a run's events is returned if one is unreadable.
    """
    events: list[OutboxEvent] = []
    unreadable: dict[RunKey, str] = {}
    for row in await _UNPUBLISHED.execute(conn, columns_of(_KEYS, keys)):
        named = dict(zip((*_EVENT, "size"), row, strict=True))
        try:
            events.append(_event_in(named, size=named.pop("size")))
        except ValueError as error:
            key = RunKey(named["tenant_id"], named["run_id"])
            unreadable.setdefault(key, f"event {named['sequence']}: {error}")
    if unreadable:
        events = [event for event in events if event.key not in unreadable]
    return Unpublished(events, unreadable)


def _event_in(row: dict[str, Any], *, size: int) -> OutboxEvent:
    """Return the event in *row*; raise ``ValueError`` if no message can hold it."""
    for name in ("type", "routing_key"):
        if (bytes_of := len(row[name].encode())) > _SHORT_MAX_BYTES:
            raise ValueError(f"{name} has {bytes_of:,} bytes; AMQP allows {_SHORT_MAX_BYTES}")
    if row["body"] is None:
        raise ValueError(f"body has {size:,} bytes; at most {EVENT_MAX_BYTES:,} are published")
    try:
        return OutboxEvent(**row, trace=trace_in(row["body"]))
    except msgspec.MsgspecError as error:
        raise ValueError(f"body is not a CloudEvent in JSON: {error}") from error


async def set_aside(conn: AsyncConnection, reasons: Mapping[RunKey, str]) -> None:
    """Keep the relay from the events of these runs for ``SET_ASIDE_SECONDS``, and store why."""
    until = func.statement_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, SET_ASIDE_SECONDS, type_=INTERVAL)
    last = outbox_events.c.sequence == EVENTS_PER_RUN
    for (tenant_id, run_id), reason in reasons.items():
        await conn.execute(
            update(outbox_events)
            .where(outbox_events.c.tenant_id == tenant_id, outbox_events.c.run_id == run_id, last)
            .values(set_aside_until=until, set_aside_reason=reason)
        )


async def mark(conn: AsyncConnection, confirmed: Sequence[OutboxEvent]) -> set[RunKey]:
    """Delete the *confirmed* events; return the runs that are now EVENTS_PUBLISHED.

    Rows are deleted by explicit id, never by a range, which would include rows committed meanwhile. *confirmed* must be
    a prefix of each run's events: a deleted last row then means that all are published. One statement; the transaction
    it runs in (with AUTOCOMMIT its own) commits asynchronously, except on Citus.
    """
    rows = ((event.tenant_id, event.run_id, event.sequence) for event in confirmed)
    done = await _MARK.execute(conn, columns_of((*_KEYS, "sequence"), rows))
    return {RunKey(*row) for row in done}


async def lock_runs(conn: AsyncConnection, tenant_id: str, run_ids: Sequence[UUID]) -> list[RunKey]:
    """Lock those of a tenant's runs that still have events in the outbox, and return them, oldest first.

    Citus locks rows of one tenant only.
    """
    query = (
        select(outbox_events.c.tenant_id, outbox_events.c.run_id)
        .where(outbox_events.c.tenant_id == tenant_id, outbox_events.c.run_id.in_(run_ids))
        .where(outbox_events.c.sequence == EVENTS_PER_RUN)
        .order_by(outbox_events.c.created_at)
        .with_for_update(skip_locked=True)
    )
    return [RunKey(*row) for row in await conn.execute(query)]


def stale_runs(
    older_than_seconds: float,
    limit: int,
    *,
    after: datetime | None = None,
    set_aside_too: bool = False,
    locked: bool = True,
) -> Select[Any]:
    """Select and lock the runs whose events are older than *older_than_seconds*, oldest first.

    Runs that are set aside are left out until their time, unless *set_aside_too*. Rows are tenant, run and the time
    they were staged, later than *after*. A run is locked through its last event's row, which exists until all are
    published; runs locked by another relay are skipped. Without *locked*, use :func:`lock_runs` before publishing.
    """
    waited = func.make_interval(0, 0, 0, 0, 0, 0, older_than_seconds, type_=INTERVAL)
    created_at = outbox_events.c.created_at
    query = (
        select(outbox_events.c.tenant_id, outbox_events.c.run_id, created_at)
        # now(), not clock_timestamp(): a volatile function would prevent the use of the index.
        .where(outbox_events.c.sequence == EVENTS_PER_RUN, created_at < func.now() - waited)
        .order_by(created_at)
        .limit(limit)
    )
    if locked:
        query = query.with_for_update(skip_locked=True)
    if not set_aside_too:
        until = outbox_events.c.set_aside_until
        query = query.where(or_(until.is_(None), until < func.now()))
    return query if after is None else query.where(created_at > after)
