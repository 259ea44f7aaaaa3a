"""Reads the keys of stored runs, newest first, page by page."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import Select, func, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.completions import run_completions
from domains.run import RunKey

# 4 MB of keys. Each page also reads the part of the table that the index has not summarized, a fifth at worst.
RUNS_A_PAGE = 20_000
# The BRIN index on received_at supports time ranges but not sorting. A page is read from a range that grows where runs
# are few: from minutes to a day.
_FIRST_RANGE = timedelta(minutes=10)
_LONGEST_RANGE = timedelta(days=1)
_SHORTEST_RANGE = timedelta(milliseconds=1)
_GROWTH = 4
# Runs that are read for each one in a sample, and the percentage of the table above which all of the period is read.
_READ_PER_SAMPLED = 30
_LARGEST_SHARE = 50.0


class Received(NamedTuple):
    """A run's key, and the time it was received."""

    received_at: datetime
    tenant_id: str
    run_id: UUID

    @property
    def key(self) -> RunKey:
        """The run's identity."""
        return RunKey(self.tenant_id, self.run_id)


class Span(NamedTuple):
    """Runs received one after another, the newest first: those below *before* down to *last*, which is one of them."""

    before: Received
    last: Received
    runs: int


async def pages(
    conn: AsyncConnection, *, since: datetime, until: datetime, tenant: str | None = None, size: int = RUNS_A_PAGE
) -> AsyncIterator[list[Received]]:
    """Yield the runs received from *since* to before *until*, all tenants' or one's; only closed-out runs.

    Each page is a separate transaction on *conn*: runs deleted or received meanwhile are not included.
    """

    async def read(low: datetime, before: Received) -> tuple[list[Received], int, Received | None]:
        rows = await conn.execute(_page(low, before, tenant).limit(size))
        found = [Received(row.received_at, row.tenant_id, row.run_id) for row in rows]
        return found, len(found), found[-1] if found else None

    async for page, _ in _read_in_ranges(conn, read, since=since, until=until, size=size):
        yield page


async def spans(
    conn: AsyncConnection, *, since: datetime, until: datetime, tenant: str | None = None, size: int = RUNS_A_PAGE
) -> AsyncIterator[Span]:
    """Yield the bounds of the pages that :func:`pages` yields; the runs stay in the database."""

    async def read(low: datetime, before: Received) -> tuple[None, int, Received | None]:
        page = _page(low, before, tenant).limit(size).cte()
        number = select(func.count()).select_from(page).scalar_subquery()
        row = (await conn.execute(select(page, number).order_by(*page.c).limit(1))).one_or_none()
        return (None, 0, None) if row is None else (None, row[3], Received(*row[:3]))

    async for _, span in _read_in_ranges(conn, read, since=since, until=until, size=size):
        yield span


def in_span(span: Span, tenant: str | None) -> Select[tuple[datetime, str, UUID]]:
    """Return a query for the keys of the runs in *span*, the last received first."""
    place = tuple_(run_completions.c.received_at, run_completions.c.tenant_id, run_completions.c.run_id)
    return _page(span.last.received_at, span.before, tenant).where(place >= tuple_(*span.last))


async def sample(
    conn: AsyncConnection, number: int, *, among: int, since: datetime, until: datetime, tenant: str | None = None
) -> tuple[list[RunKey], bool]:
    """Return at most *number* random runs of the period, of which there are about *among*, and whether these are all.

    Of many runs, random pages of the table are read, with some thirty times as many runs: neighbours on a page were
    received together and may be alike. Of few runs, all are read.
    """
    runs = run_completions
    share = 100 * number * _READ_PER_SAMPLED / max(among, 1)
    by_page = share < _LARGEST_SHARE
    table = runs.tablesample(func.system(share)) if by_page else runs
    query = (
        select(table.c.tenant_id, table.c.run_id)
        .where(table.c.received_at >= since, table.c.received_at < until, table.c.committed_at.is_not(None))
        .order_by(func.random())
        .limit(number)
    )
    rows = (await conn.execute(query if tenant is None else query.where(table.c.tenant_id == tenant))).all()
    await conn.commit()
    return [RunKey(*row) for row in rows], not by_page and len(rows) < number


_Page = TypeVar("_Page")
_Read = Callable[[datetime, Received], Awaitable[tuple[_Page, int, Received | None]]]


async def _read_in_ranges(
    conn: AsyncConnection, read: _Read[_Page], *, since: datetime, until: datetime, size: int
) -> AsyncIterator[tuple[_Page, Span]]:
    """Yield what *read* returns for each time range in which it finds runs, and the span of these runs."""
    before = Received(until, "", UUID(int=0))
    length = _FIRST_RANGE
    while before.received_at > since:
        low = max(since, before.received_at - length)
        page, number, last = await read(low, before)
        await conn.commit()
        if last is not None:
            yield page, Span(before, last, number)
        if last is not None and number == size:
            length = max(_SHORTEST_RANGE, before.received_at - last.received_at)
            before = last
        else:
            growth = min(_GROWTH, size / number) if number else _GROWTH
            length = min(_LONGEST_RANGE, (before.received_at - low) * growth + _SHORTEST_RANGE)
            before = Received(low, "", UUID(int=0))


async def estimate(conn: AsyncConnection, *, since: datetime, until: datetime, tenant: str | None = None) -> int:
    """Return the planner's estimate of how many runs :func:`pages` will yield."""
    of_tenant = "" if tenant is None else "AND tenant_id = :tenant"
    values = {"since": since, "until": until} | ({} if tenant is None else {"tenant": tenant})
    # A generic plan would not estimate this range.
    await conn.execute(text("SET LOCAL plan_cache_mode = force_custom_plan"))
    found = await conn.execute(text(_ESTIMATE.replace("OF_TENANT", of_tenant)), values)
    plan = found.scalar_one()
    await conn.commit()
    return int((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]["Plan Rows"])


_ESTIMATE = """
    EXPLAIN (FORMAT JSON)
    SELECT 1 FROM governance.run_completions WHERE received_at >= :since AND received_at < :until OF_TENANT
"""


def _page(low: datetime, before: Received, tenant: str | None) -> Select[tuple[datetime, str, UUID]]:
    run = run_completions.c
    place = (run.received_at, run.tenant_id, run.run_id)
    query = (
        select(*place)
        .where(run.received_at >= low, run.received_at <= before.received_at)
        .where(tuple_(*place) < tuple_(*before))
        .where(run.committed_at.is_not(None))
        .order_by(*(column.desc() for column in place))
    )
    return query if tenant is None else query.where(run.tenant_id == tenant)
