"""Probes both servers while the worker consumes, so that an idle worker reports the loss of one within 5 s."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from consumer.amqp.connection import BROKER_ERRORS
from consumer.errors import UnavailableError, one_line
from consumer.postgres.engine import DATABASE_ERRORS

# Seconds. A silent server is reported after an interval and a response time, and 5 are promised.
INTERVAL_SECONDS = 0.75
RESPONSE_SECONDS = 3.5
# Seconds for a response that waits in the socket because this process was suspended or busy.
_LATE_SECONDS = 0.25

# By the name of the server: returns if it responds, and raises the client's error if not.
Probes = Mapping[str, Callable[[], Awaitable[object]]]


async def watch_servers(leaving: asyncio.Event, probes: Probes, *, progress: Callable[[], int]) -> str | None:
    """Probe each server until *leaving* is set, and return ``None``; or return why one is unavailable.

    While *progress* rises no server counts as silent: under load a response waits behind megabytes of deliveries.
    """
    left = asyncio.ensure_future(leaving.wait())
    watching = [asyncio.ensure_future(_watch(name, probe, progress)) for name, probe in probes.items()]
    try:
        await asyncio.wait({left, *watching}, return_when=asyncio.FIRST_COMPLETED)
        return next((task.result() for task in watching if task.done()), None)
    finally:
        for task in (left, *watching):
            task.cancel()
        await asyncio.gather(left, *watching, return_exceptions=True)


async def _watch(name: str, probe: Callable[[], Awaitable[object]], progress: Callable[[], int]) -> str:
    """Return once the server does not respond, with the reason."""
    while True:
        response = asyncio.ensure_future(probe())
        try:
            if not await _responds(response, progress):
                return f"{name} has not responded for {RESPONSE_SECONDS:g} s"
            response.result()
        except UnavailableError as error:
            return one_line(error)
        except (*DATABASE_ERRORS, *BROKER_ERRORS) as error:
            return f"{name} is not available: {one_line(error)}"
        finally:
            response.cancel()
        await asyncio.sleep(INTERVAL_SECONDS)


async def _responds(response: "asyncio.Future[object]", progress: Callable[[], int]) -> bool:
    """Wait for *response*, at most ``RESPONSE_SECONDS`` after the last progress; return whether it came."""
    seen, since = progress(), monotonic()
    while not response.done():
        await asyncio.wait({response}, timeout=_LATE_SECONDS)
        if progress() != seen:
            seen, since = progress(), monotonic()
        elif monotonic() > since + RESPONSE_SECONDS:
            await asyncio.wait({response}, timeout=_LATE_SECONDS)
            break
    return response.done()
