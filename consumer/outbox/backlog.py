"""How much waits in the outbox: asked for regularly, whether or not the relay gets anything out.

A broker that confirms nothing keeps the relay from ending a sweep, and that is when these numbers are needed.
"""

import asyncio
from contextlib import suppress
from math import nan

from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.postgres.engine import DATABASE_ERRORS

# Seconds. A scrape comes every 15 or 30; the query reads one index, at most 10,000 entries of it.
LOOK_EVERY_SECONDS = 5.0


async def watch_outbox(
    stopping: asyncio.Event, *, engine: AsyncEngine, metrics: Metrics, every: float = LOOK_EVERY_SECONDS
) -> None:
    """Keep the two outbox gauges true until *stopping* is set; while the database cannot be asked they are NaN.

    A number from before an outage would pass for one of now, and keep an alert up, or down.
    """
    while not stopping.is_set():
        pending, oldest = nan, nan
        with suppress(*DATABASE_ERRORS):
            async with engine.connect() as conn:
                pending, oldest = await outbox.backlog(conn)
        metrics.outbox_pending.set(pending)
        metrics.outbox_oldest.set(oldest)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), every)
