"""Shared reads: fifty open browsers cost a server as much as one, and none of them waits long."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Generic, TypeVar

import structlog

from consumer.errors import UnavailableError, one_line

log = structlog.get_logger(__name__)
T = TypeVar("T")


class BusyError(UnavailableError):
    """All sessions are busy; no action is needed."""


class GivenUpError(UnavailableError):
    """The query took too long and was canceled; no action is needed."""


# Minimum seconds between two reads: a page that refreshes every two seconds always shows a new one.
FRESH_SECONDS = 1.0
# A slow read becomes less frequent, so that all viewers together use at most a thirtieth of the server's time, for any
# table size; but it stays frequent enough to wait for.
_SHARE = 30.0
_SELDOM_SECONDS = 20.0
# Seconds that a viewer waits for a new read before the last one is shown: the page responds within one second.
PATIENCE_SECONDS = 0.6
# Seconds without a response after which a server counts as unavailable: a first connection over TLS takes longer than
# the patience.
_AWAY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[T]):
    """The last value that was read, its time, and why there is no newer one."""

    value: T | None = None
    read_at: datetime | None = None
    fault: str | None = None
    is_slow: bool = False  # the server is only slow


class SharedRead(Generic[T]):
    """Reads on request if the last value is outdated; at most one read is in progress.

    *read* raises ``UnavailableError`` with a human-readable message. It is never cancelled, because a task
    cancelled inside a database call can leak its connection; it must bound its own waits.
    """

    def __init__(
        self, what: str, read: Callable[[], Awaitable[T]], *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._what = what
        self._read = read
        self._patience_seconds = patience_seconds
        self._known: Snapshot[T] = Snapshot()
        self._task: asyncio.Task[None] | None = None
        self._started = self._due = float("-inf")

    async def latest(self) -> Snapshot[T]:
        """Return the current value, waiting briefly for a new read if one is due; never raises."""
        if self._task is None and monotonic() >= self._due:
            self._started = monotonic()
            self._task = asyncio.create_task(self._renew())
        task = self._task
        if task is not None:
            await asyncio.wait({task}, timeout=max(0.0, self._started + self._patience_seconds - monotonic()))
            if not task.done():
                waited = monotonic() - self._started
                if self._known.fault is None:
                    fault = f"{self._what} has not responded for {waited:.1f} s"
                    return replace(self._known, fault=fault, is_slow=waited < _AWAY_SECONDS)
        return self._known

    async def settle(self, within: float) -> None:
        """Wait until no read is in progress, at most *within* seconds."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=within)

    async def _renew(self) -> None:
        cost = 0.0  # time the server spent; an unavailable server spends none
        try:
            self._known = Snapshot(await self._read(), datetime.now(UTC))
            cost = monotonic() - self._started
        except UnavailableError as error:
            if isinstance(error, GivenUpError):
                cost = monotonic() - self._started
            is_slow = isinstance(error, BusyError | GivenUpError)
            self._known = replace(self._known, fault=one_line(error), is_slow=is_slow)
        except Exception as error:  # a bug in the console must not end the worker
            log.exception("console read failed", what=self._what)
            self._known = replace(self._known, fault=f"{self._what}: {one_line(error)}", is_slow=False)
        finally:
            self._due = monotonic() + min(max(FRESH_SECONDS, _SHARE * cost), _SELDOM_SECONDS)
            self._task = None
