"""The console's queries: bounded lookups in read-only transactions, in dedicated sessions."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import Column, Select, func, select, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from consumer.console.shared_reads import BusyError, GivenUpError
from consumer.errors import UnavailableError, one_line, sqlstate_of
from consumer.outbox.backlog import Pending, count_pending
from consumer.postgres.engine import DATABASE_ERRORS, Url, open_session
from consumer.runs import lookup as inspection
from consumer.runs.lookup import Row, RunFile, read_run
from domains.run import RunKey
from domains.tables import incidents, policy_evaluations, prevention_records, rollbacks, run_completions

APPLICATION_NAME = "closeout-console"
# One for the overview, one for single runs.
SESSIONS = 2
# Seconds. A statement takes milliseconds; 0.75 s was too short for a run of a megabyte on a busy machine. Pages do not
# wait for them: shared_reads.PATIENCE_SECONDS. The pool's timeout exceeds a statement's, the command's exceeds both.
_STATEMENT_SECONDS = 3.0
_CONNECT_SECONDS = 5.0
_COMMAND_SECONDS = 6.0
_POOL_SECONDS = 4.0
_SERVER_SETTINGS = {
    "application_name": APPLICATION_NAME,
    "statement_timeout": f"{_STATEMENT_SECONDS * 1000:.0f}ms",
    "lock_timeout": "250ms",
    "idle_in_transaction_session_timeout": "5s",
    # One process, and the BRIN index even with outdated statistics: a page must never start a sequential scan of a
    # large table.
    "max_parallel_workers_per_gather": "0",
    "enable_seqscan": "off",
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
}
# The BRIN indexes on received_at and occurred_at support time ranges but not sorting. The range is widened until it has
# enough rows, then narrowed to a little more than that.
_WINDOWS = tuple(timedelta(seconds=s) for s in (5, 60, 600, 3_600, 6 * 3_600, 86_400, 7 * 86_400))
_NARROW_ENOUGH = 100
LATEST_RUNS = 15
LATEST_ROLLBACKS = 10
# Seconds over which the rate of all workers is measured.
PACE_SECONDS = 10
_PACE_AT_MOST = 50_000
_CANCELED_BY_TIMEOUT = "57014"


@dataclass(frozen=True, slots=True)
class Pace:
    """The commits of all workers in the last ten seconds; lags are in seconds, ``None`` without commits."""

    runs: int
    lag_median: float | None
    lag_most: float | None

    @property
    def per_second(self) -> float:
        """Runs per second."""
        return self.runs / PACE_SECONDS

    @property
    def is_cut(self) -> bool:
        """Return whether there may be more than were counted."""
        return self.runs >= _PACE_AT_MOST


def create_console_engine(url: Url) -> AsyncEngine:
    """Return a read-only engine for *url*; connects to nothing yet."""

    async def connect(**_ignored: Any) -> asyncpg.Connection:  # noqa: ANN401 - SQLAlchemy's own arguments
        return await open_session(
            url, connect_seconds=_CONNECT_SECONDS, command_seconds=_COMMAND_SECONDS, server_settings=_SERVER_SETTINGS
        )

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=SESSIONS,
        max_overflow=0,
        pool_timeout=_POOL_SECONDS,
        pool_pre_ping=True,
        pool_use_lifo=True,
        # Not default_transaction_read_only: a URL with target_session_attrs=read-write would reject every host.
        execution_options={"postgresql_readonly": True},
    )


async def pending_events(engine: AsyncEngine) -> Pending:
    """Return the outbox's backlog; raise :class:`UnavailableError`."""
    async with _session(engine) as conn:
        return await count_pending(conn)


async def pace(engine: AsyncEngine) -> Pace:
    """Return the recent commits of all workers; raise :class:`UnavailableError`."""
    async with _session(engine) as conn:
        runs, lags = (await conn.execute(_PACE)).one()
    median, most = lags or (None, None)
    return Pace(runs, median, most)


# received_at (worker's clock) has the index, committed_at (server's clock) has not: allow five seconds in between.
_PACE = text(
    f"""
    SELECT count(*), percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY lag)
      FROM (SELECT greatest(extract(epoch FROM committed_at - completed_at), 0) AS lag
              FROM governance.run_completions
             WHERE received_at > now() - interval '{PACE_SECONDS + 5} s'
               AND committed_at > now() - interval '{PACE_SECONDS} s'
             LIMIT {_PACE_AT_MOST}) AS lately
    """  # noqa: S608 - constants of ours
)


async def latest_rollbacks(engine: AsyncEngine) -> Sequence[Row]:
    """Return the last rolled-back attempts, newest first; raise :class:`UnavailableError`."""
    row = rollbacks.c
    query = select(
        row.occurred_at, row.tenant_id, row.run_id, row.attempt, row.phase_reached, row.operations, row.error_type,
        func.left(row.error, 2_000).label("error"),
    )  # fmt: skip
    async with _session(engine) as conn:
        return await _newest(conn, query, row.occurred_at, LATEST_ROLLBACKS)


async def latest_runs(engine: AsyncEngine) -> Sequence[Row]:
    """Return the latest runs of all workers, newest first, with finding and evaluation.

    Raises :class:`UnavailableError`.
    """
    run = run_completions.c
    # By complete keys, and only for returned rows: the server evaluates scalar subqueries after the limit. A join would
    # read the rows of three tables for the complete time range.
    severity, prevented, policy = (
        select(column).where(table.c.tenant_id == run.tenant_id, table.c.run_id == run.run_id).scalar_subquery()
        for table, column in (
            (incidents, incidents.c.severity),
            (prevention_records, prevention_records.c.created_at),
            (policy_evaluations, policy_evaluations.c.outcome),
        )
    )
    query = select(
        run.received_at, run.tenant_id, run.run_id, run.run_ref, func.left(run.agent_id, 200).label("agent_id"),
        run.status, run.error_code, run.phase, run.mode, run.is_synthetic, run.completed_at, run.committed_at,
        run.events_published_at, severity.label("severity"), prevented.is_not(None).label("prevented"),
        policy.label("policy"),
    )  # fmt: skip
    async with _session(engine) as conn:
        return await _newest(conn, query, run.received_at, LATEST_RUNS)


async def read_one_run(engine: AsyncEngine, tenant_id: str, run_id: UUID) -> RunFile | None:
    """Return all stored rows of one run; raise :class:`UnavailableError`."""
    async with _translated():
        return await read_run(engine, run_id, tenant=tenant_id)


async def owners(engine: AsyncEngine, text: str) -> list[RunKey]:
    """Return the keys of the runs called *text*, at most ``TENANTS_AT_MOST``; raise :class:`UnavailableError`."""
    async with _session(engine) as conn:
        return await inspection.owners(conn, text)


async def _newest(conn: AsyncConnection, query: Select[Any], at: Column[Any], number: int) -> list[Row]:
    """Return the newest *number* rows of *query* by *at*, newest first, without sorting many more."""
    shortest, window = timedelta(0), _WINDOWS[-1]
    for window in _WINDOWS:
        if await _holds(conn, at, window, number):
            break
        shortest = window
    # After a burst an hour ago the last range may have a million rows: halve it until it does not.
    while window > _WINDOWS[0] and window - shortest > window / _NARROW_ENOUGH:
        middle = (shortest + window) / 2
        if await _holds(conn, at, middle, number):
            window = middle
        else:
            shortest = middle
    newest = query.where(at > func.now() - window).order_by(at.desc()).limit(number)
    return [dict(row) for row in (await conn.execute(newest)).mappings()]


async def _holds(conn: AsyncConnection, at: Column[Any], window: timedelta, number: int) -> bool:
    """Return whether there are *number* rows within *window*; stops reading at that number."""
    some = select(at).where(at > func.now() - window).limit(number).subquery()
    return bool((await conn.execute(select(func.count()).select_from(some))).scalar_one() == number)


@asynccontextmanager
async def _session(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with _translated(), engine.connect() as conn:
        yield conn


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except PoolTimeoutError as error:
        raise BusyError("PostgreSQL: the console's sessions are busy; try again in a moment") from error
    except DATABASE_ERRORS as error:
        if sqlstate_of(error) == _CANCELED_BY_TIMEOUT:
            text = f"PostgreSQL: query canceled after {_STATEMENT_SECONDS:g} s, to protect the worker"
            raise GivenUpError(text) from error
        raise UnavailableError(f"PostgreSQL is not available: {one_line(error)}") from error
