"""Removes old runs completely, in small transactions, safe next to live workers.

The inbox is scanned once in page order with TID range scans, so that a batch costs the same for any table size and any
distribution of old rows. The BRIN index on ``received_at`` degrades: space freed by pruning is reused, and page ranges
then contain old and new times. Measured with 90 days kept and daily pruning: finding the first hour of the oldest day
read 46 of 4,137 pages at first, 1,333 after a month, 4,060 of 4,228 after three.

On Citus, the pages are not on this node. There each tenant's keys are scanned once in order, on the tenant's own node.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import Row, Select, Table, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.closeout.retries import retry_transient
from consumer.maintenance.limits import BATCH_RUNS
from consumer.maintenance.prune_batch import (
    Pruned,
    Scope,
    old_rollbacks,
    old_runs,
    remove_runs,
    remove_stray_rollbacks,
)
from consumer.wording import Progress
from domains.database.statements import on_citus
from domains.tables import rollbacks, run_completions

__all__ = ["Pruned", "Scope", "cutoff", "prune"]

T = TypeVar("T")
# Pages (8 KiB) per statement: 1 MiB, and up to 64 MiB where no old rows are found.
_PAGES, _PAGES_MAX = 128, 8192
# Keys per statement on Citus.
_KEYS_READ = 20_000
# Limits for a lock and a statement, far below the worker's 5 s and 15 s.
_BOUNDS = text(
    "SELECT set_config('lock_timeout', '1s', true), set_config('statement_timeout', '10s', true), "
    "set_config('enable_bitmapscan', 'off', true)"
)
# Minimum pause between two batches, in seconds; the pause is as long as the last batch.
_PAUSE_SECONDS = 0.01

Place = tuple[int, int]  # page, and position in it
_Remove = Callable[[AsyncConnection, Scope, Sequence[Row[Any]]], Awaitable[Pruned]]


class _Kind(NamedTuple):
    """What is pruned: its table, the column that is unique within a tenant, the old rows, and how to remove them."""

    table: Table
    key: str
    old: Callable[[Scope], Select[Any]]
    remove: _Remove


_KINDS = (
    _Kind(run_completions, "run_id", old_runs, remove_runs),
    _Kind(rollbacks, "rollback_id", old_rollbacks, remove_stray_rollbacks),
)


class _Part(NamedTuple):
    """The rows between two places, and the maximum number to take."""

    after: Place
    until: Place
    batch: int


async def cutoff(engine: AsyncEngine, age: timedelta) -> datetime:
    """Return the time *age* ago by the database's clock."""
    async with engine.connect() as conn:
        now: datetime = (await conn.execute(select(func.now()))).scalar_one()
    return now - age


async def prune(
    engine: AsyncEngine, scope: Scope, report: Pruned, *, batch: int = BATCH_RUNS, progress: Progress | None = None
) -> None:
    """Remove the runs of *scope* with everything that belongs to them; *report* grows as batches are committed.

    A run is removed completely, in one transaction, or kept: if it has events in the outbox, an unfinished legacy
    close-out, an OPEN incident (unless *scope* includes those), or a lock of another session. Rollbacks of runs that
    were never committed are removed by their own age. Raises the database's errors.
    """
    async with engine.connect() as conn:
        walk = _by_tenant if on_citus(conn) else _by_page
    await walk(_Pruning(engine, scope, report, batch, progress or (lambda _done, _of: None)))


class _Pruning(NamedTuple):
    """The arguments of :func:`prune`."""

    engine: AsyncEngine
    scope: Scope
    report: Pruned
    batch: int
    progress: Progress


async def _by_page(pruning: _Pruning) -> None:
    sizes = [await _pages_of(pruning.engine, kind.table) for kind in _KINDS]
    for number, kind in enumerate(_KINDS):
        at, step = (0, 0), _PAGES
        while at[0] < sizes[number]:
            end = min(at[0] + step, sizes[number])
            pruned, last = await _in_transaction(
                pruning, partial(_pages_done, kind, _Part(at, (end, 0), pruning.batch))
            )
            at = last or (end, 0)
            step = _PAGES if pruned.rows or last else min(2 * step, _PAGES_MAX)
            pruning.progress(sum(sizes[:number]) + at[0], sum(sizes))


async def _pages_done(kind: _Kind, part: _Part, conn: AsyncConnection, scope: Scope) -> tuple[Pruned, Place | None]:
    """Prune at most a batch in *part*; return also the place of the last row if the batch was full."""
    found = await _old_in(conn, kind, scope, part)
    return await kind.remove(conn, scope, found), _last(found, part)


async def _by_tenant(pruning: _Pruning) -> None:
    for number, kind in enumerate(_KINDS):
        async with pruning.engine.connect() as conn:
            found = (await conn.execute(select(kind.table.c.tenant_id).distinct())).scalars().all()
        tenants = [tenant for tenant in sorted(found) if pruning.scope.tenant in {None, tenant}]
        for position, tenant in enumerate(tenants, 1):
            of_tenant = pruning._replace(scope=pruning.scope._replace(tenant=tenant))
            after: UUID | None = None
            while True:
                _, after = await _in_transaction(of_tenant, partial(_keys_done, kind, after, pruning.batch))
                if after is None:
                    break
            pruning.progress(number * len(tenants) + position, len(_KINDS) * len(tenants))


async def _keys_done(
    kind: _Kind, after: UUID | None, batch: int, conn: AsyncConnection, scope: Scope
) -> tuple[Pruned, UUID | None]:
    """Prune at most a batch of one tenant's keys later than *after*; return also where to continue, if anywhere."""
    key = kind.table.c[kind.key]
    later = [] if after is None else [key > after]
    following = select(key).where(kind.table.c.tenant_id == scope.tenant, *later).order_by(key).limit(_KEYS_READ)
    last = following.subquery().c[kind.key]
    upto = (await conn.execute(select(last).order_by(last.desc()).limit(1))).scalar_one_or_none()
    if upto is None:
        return Pruned(), None
    query = kind.old(scope).where(*later, key <= upto).order_by(key).limit(batch)
    found = (await conn.execute(query)).all()
    return await kind.remove(conn, scope, found), found[-1][1] if len(found) == batch else upto


async def _in_transaction(
    pruning: _Pruning, work: Callable[[AsyncConnection, Scope], Awaitable[tuple[Pruned, T]]]
) -> tuple[Pruned, T]:
    """Do *work* in one transaction, again after a transient failure; pause as long as it took if it removed rows."""

    async def once() -> tuple[Pruned, T]:
        async with pruning.engine.begin() as conn:
            await conn.execute(_BOUNDS)
            return await work(conn, pruning.scope)

    began = monotonic()
    pruned, place = await retry_transient(once)
    pruning.report.add(pruned)
    removed = pruned.rows and not pruning.scope.dry_run
    await asyncio.sleep(max(monotonic() - began, _PAUSE_SECONDS) if removed else 0)
    return pruned, place


async def _old_in(conn: AsyncConnection, kind: _Kind, scope: Scope, part: _Part) -> Sequence[Row[Any]]:
    """Return at most a batch of old rows in this part, in order of and with their places."""
    query = (
        kind.old(scope)
        .add_columns(text(f"{kind.table}.ctid AS place"))
        .where(
            text(f"{kind.table}.ctid > CAST(CAST(:after AS text) AS tid)"),
            text(f"{kind.table}.ctid < CAST(CAST(:until AS text) AS tid)"),
        )
    )
    places = {"after": "({},{})".format(*part.after), "until": "({},{})".format(*part.until)}
    found: Sequence[Row[Any]] = (await conn.execute(query.limit(part.batch), places)).all()
    return found


def _last(found: Sequence[Row[Any]], part: _Part) -> Place | None:
    return (found[-1].place[0], found[-1].place[1]) if len(found) == part.batch else None


async def _pages_of(engine: AsyncEngine, table: Table) -> int:
    size = "SELECT pg_relation_size(CAST(:name AS regclass)) / current_setting('block_size')::int"
    async with engine.connect() as conn:
        return int((await conn.execute(text(size), {"name": str(table)})).scalar_one())
