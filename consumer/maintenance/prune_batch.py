"""Removes a batch of old runs with everything that belongs to them, in the caller's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Delete, Row, Select, Table, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.phases import TransactionPhase
from domains.database.statements import columns_of, of_given_tenants, on_citus, unnest
from domains.run import RunKey
from domains.tables import (
    incidents,
    outbox_events,
    policy_evaluations,
    prevention_records,
    rollbacks,
    run_completions,
    traces,
)

_RUN = ("tenant_id", "run_id")
_ROLLBACK = ("tenant_id", "rollback_id")
_IS_OPEN = incidents.c.status == "OPEN"


class Scope(NamedTuple):
    """The runs to remove, and whether to remove or only count them."""

    before: datetime
    tenant: str | None = None
    open_incidents: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class Pruned:
    """Removed runs and rows by table (or that would be removed), and old runs that were kept, by reason."""

    runs: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    open_incidents: int = 0
    events_waiting: int = 0
    unfinished: int = 0
    in_use: int = 0

    def add(self, other: "Pruned") -> None:
        """Add the result of another batch."""
        for name in ("runs", "open_incidents", "events_waiting", "unfinished", "in_use"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for table, number in other.rows.items():
            self.rows[table] = self.rows.get(table, 0) + number


def old_runs(scope: Scope) -> Select[Any]:
    """Select the old runs of *scope*, for :func:`remove_runs`."""
    run = run_completions.c
    query = select(run.tenant_id, run.run_id, run.phase, run.committed_at).where(run.received_at < scope.before)
    return query if scope.tenant is None else query.where(run.tenant_id == scope.tenant)


def old_rollbacks(scope: Scope) -> Select[Any]:
    """Select the old rollbacks of *scope*, for :func:`remove_stray_rollbacks`."""
    row = rollbacks.c
    has_run = (
        select(run_completions.c.run_id)
        .where(run_completions.c.tenant_id == row.tenant_id, run_completions.c.run_id == row.run_id)
        .exists()
    )
    query = select(row.tenant_id, row.rollback_id, has_run.label("has_run")).where(row.occurred_at < scope.before)
    return query if scope.tenant is None else query.where(row.tenant_id == scope.tenant)


async def remove_runs(conn: AsyncConnection, scope: Scope, found: Sequence[Row[Any]]) -> Pruned:
    """Remove those of *found* that nothing needs, or only count them; all of one tenant on Citus."""
    run = run_completions.c
    pruned = Pruned(unfinished=sum(row.committed_at is None for row in found))
    ready = {RunKey(row.tenant_id, row.run_id) for row in found if row.phase == TransactionPhase.EVENTS_PUBLISHED}
    # Closeout never leaves a run COMMITTED without events in the outbox; it is kept, so that reconcile reports it.
    pruned.events_waiting = len(found) - pruned.unfinished - len(ready)
    kept = _keys_of(run_completions).where(run.phase == TransactionPhase.EVENTS_PUBLISHED.value)
    held = (
        ready if scope.dry_run else await _keys(conn, kept.with_for_update(skip_locked=True, of=run_completions), ready)
    )
    pruned.in_use = len(ready) - len(held)
    waiting = await _keys(conn, _keys_of(outbox_events), held)
    pruned.events_waiting += len(waiting)
    victims = await _without_open_incidents(conn, held - waiting, scope, pruned)
    if victims and not scope.dry_run:
        for table in (incidents, prevention_records, policy_evaluations, traces, rollbacks, run_completions):
            gone = await conn.execute(_delete(conn, table, _RUN), columns_of(_RUN, sorted(victims)))
            pruned.rows[table.name] = gone.rowcount
    elif victims:
        pruned.rows[run_completions.name] = len(victims)
    pruned.runs = len(victims)
    return pruned


async def _without_open_incidents(
    conn: AsyncConnection, keys: set[RunKey], scope: Scope, pruned: Pruned
) -> set[RunKey]:
    """Return those of *keys* whose incident may be removed, and lock it so that it cannot be reopened meanwhile."""
    any_incident = _keys_of(incidents)
    may_go = any_incident if scope.open_incidents else any_incident.where(incidents.c.status != "OPEN")
    free = await _keys(conn, may_go if scope.dry_run else may_go.with_for_update(skip_locked=True, of=incidents), keys)
    others = await _keys(conn, any_incident, keys - free)
    still_open = set() if scope.open_incidents else await _keys(conn, any_incident.where(_IS_OPEN), others)
    pruned.open_incidents = len(still_open)
    pruned.in_use += len(others - still_open)
    return keys - others


async def remove_stray_rollbacks(conn: AsyncConnection, scope: Scope, found: Sequence[Row[Any]]) -> Pruned:
    """Remove those of *found* whose run is not stored, or only count them."""
    stray = sorted((old.tenant_id, old.rollback_id) for old in found if not old.has_run)
    if stray and not scope.dry_run:
        await conn.execute(_delete(conn, rollbacks, _ROLLBACK), columns_of(_ROLLBACK, stray))
    return Pruned(rows={rollbacks.name: len(stray)} if stray else {})


def _keys_of(table: Table) -> Select[Any]:
    """Select the given runs that have rows in *table*."""
    given = unnest(table, _RUN)
    return select(table.c.tenant_id, table.c.run_id).where(*(table.c[name] == given.c[name] for name in _RUN))


async def _keys(conn: AsyncConnection, query: Select[Any], keys: set[RunKey]) -> set[RunKey]:
    if not keys:
        return set()
    if on_citus(conn):
        query = query.where(of_given_tenants(query.selected_columns.tenant_id.table))
    return {RunKey(*row) for row in await conn.execute(query, columns_of(_RUN, sorted(keys)))}


def _delete(conn: AsyncConnection, table: Table, names: Sequence[str]) -> Delete:
    given = unnest(table, names)
    statement = delete(table).where(*(table.c[name] == given.c[name] for name in names))
    return statement.where(of_given_tenants(table)) if on_citus(conn) else statement
