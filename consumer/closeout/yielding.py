"""Long work in the event loop, with turns for everybody else: heartbeats, acks, probes, other transactions."""

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Seconds that one task may hold the loop. A usual batch of a hundred runs is decoded in 3 ms and never pauses.
TURN_SECONDS = 0.05


class Turns:
    """Counts from its making, or from the last pause."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = perf_counter()

    async def pause_if_due(self) -> None:
        """Let the loop turn once if this task has held it too long."""
        if perf_counter() - self._since > TURN_SECONDS:
            await asyncio.sleep(0)
            self._since = perf_counter()


async def each(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Return what *work* makes of each of *items*, in order, with turns between."""
    turns, done = Turns(), []
    for item in items:
        await turns.pause_if_due()
        done.append(work(item))
    return done
