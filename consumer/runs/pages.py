"""Reads the keys of stored runs, newest first, page by page."""

import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Select, select, text, tuple_
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


class Received(NamedTuple):
    """A run's key, and the time it was received."""

    received_at: datetime
    tenant_id: str
    run_id: UUID

    @property
    def key(self) -> RunKey:
        """The run's identity."""
        return RunKey(self.tenant_id, self.run_id)


async def pages(
    conn: AsyncConnection, *, since: datetime, until: datetime, tenant: str | None = None, size: int = RUNS_A_PAGE
) -> AsyncIterator[list[Received]]:
    """Yield the runs received from *since* to before *until*, all tenants' or one's; only closed-out runs.

    Each page is a separate transaction on *conn*: runs deleted or received meanwhile are not included.
    """
    before = Received(until, "", UUID(int=0))
    length = _FIRST_RANGE
    while before.received_at > since:
        low = max(since, before.received_at - length)
        rows = await conn.execute(_page(low, before, tenant).limit(size))
        found = [Received(row.received_at, row.tenant_id, row.run_id) for row in rows]
        await conn.commit()
        if found:
            yield found
        if len(found) == size:
            length = max(_SHORTEST_RANGE, before.received_at - found[-1].received_at)
            before = found[-1]
        else:
            growth = min(_GROWTH, size / len(found)) if found else _GROWTH
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
