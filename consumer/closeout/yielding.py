"""Cooperative yields in long computations, so that heartbeats, acks, probes and other transactions run."""

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Seconds that one task may hold the loop. A batch of a hundred runs is decoded in 3 ms and never yields.
YIELD_AFTER_SECONDS = 0.05


class CooperativeYield:
    """Measures the time since it was created, or since the last yield."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = perf_counter()

    async def yield_if_due(self) -> None:
        """Yield to the event loop if this task has held it too long."""
        if perf_counter() - self._since > YIELD_AFTER_SECONDS:
            await asyncio.sleep(0)
            self._since = perf_counter()


async def each(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Return the result of *work* for each of *items*, in order, yielding to the event loop between them."""
    yielding, done = CooperativeYield(), []
    for item in items:
        await yielding.yield_if_due()
        done.append(work(item))
    return done
