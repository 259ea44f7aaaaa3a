"""One reading for all viewers: fifty open browsers cost a server what one does, and none of them waits for long."""

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
    """Others are being answered; nobody needs to act."""


class GivenUpError(UnavailableError):
    """The server worked on it for as long as it may; nobody needs to act."""


# Seconds between two readings at least: a page that refreshes every two seconds always shows a new one.
FRESH_SECONDS = 1.0
# A reading that takes long is made less often, so that all viewers together keep a server busy for a thirtieth of the
# time at most, however large its tables are; but not so seldom that nobody waits for it.
_SHARE = 30.0
_SELDOM_SECONDS = 20.0
# Seconds that a viewer waits for a new reading before the last known one is shown instead: the page answers within one.
PATIENCE_SECONDS = 0.6
# Seconds of silence after which a server counts as away: a first connection over TLS takes longer than the patience.
_AWAY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What is known: the last value that could be read, when that was, and why there is no newer one."""

    value: T | None = None
    read_at: datetime | None = None
    fault: str | None = None
    is_slow: bool = False  # the fault is no more than that


class Shared(Generic[T]):
    """Reads when somebody asks and the last reading is not fresh; at most one reading is under way at a time.

    *read* raises ``UnavailableError`` in words a person understands. It is never cancelled, for a task cancelled
    inside a database call can leak its connection; it must bound its own waits.
    """

    def __init__(
        self, what: str, read: Callable[[], Awaitable[T]], *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._what = what
        self._read = read
        self._patience_seconds = patience_seconds
        self._known: Reading[T] = Reading()
        self._task: asyncio.Task[None] | None = None
        self._started = self._due = float("-inf")

    async def latest(self) -> Reading[T]:
        """Return what is known now, waiting a little for a new reading where one is due; never raises."""
        if self._task is None and monotonic() >= self._due:
            self._started = monotonic()
            self._task = asyncio.create_task(self._renew())
        task = self._task
        if task is not None:
            await asyncio.wait({task}, timeout=max(0.0, self._started + self._patience_seconds - monotonic()))
            if not task.done():
                waited = monotonic() - self._started
                if self._known.fault is None:
                    fault = f"{self._what} has not answered for {waited:.1f} s"
                    return replace(self._known, fault=fault, is_slow=waited < _AWAY_SECONDS)
        return self._known

    async def settle(self, within: float) -> None:
        """Wait until no reading is under way, at most *within* seconds."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=within)

    async def _renew(self) -> None:
        cost = 0.0  # of what the server did; the silence of one that is away costs it nothing
        try:
            self._known = Reading(await self._read(), datetime.now(UTC))
            cost = monotonic() - self._started
        except UnavailableError as error:
            if isinstance(error, GivenUpError):
                cost = monotonic() - self._started
            is_slow = isinstance(error, BusyError | GivenUpError)
            self._known = replace(self._known, fault=one_line(error), is_slow=is_slow)
        except Exception as error:  # a bug in the console must not end the worker
            log.exception("the console cannot read", what=self._what)
            self._known = replace(self._known, fault=f"{self._what}: {one_line(error)}", is_slow=False)
        finally:
            self._due = monotonic() + min(max(FRESH_SECONDS, _SHARE * cost), _SELDOM_SECONDS)
            self._task = None
