"""Polling with a deadline, for tests that have no event to wait for.

The deadline ends a test that failed; it asserts nothing about speed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")
Ignored = type[Exception] | tuple[type[Exception], ...]
# Seconds. The slowest wait takes about ten (the retry delay); a busy machine must not exceed this.
PATIENCE = 60.0


@overload
async def until(
    check: Callable[[], Awaitable[T | None]],
    *,
    within: float = ...,
    every: float = ...,
    what: str = ...,
    ignoring: Ignored = ...,
) -> T: ...


@overload
async def until(
    check: Callable[[], T | None],
    *,
    within: float = ...,
    every: float = ...,
    what: str = ...,
    ignoring: Ignored = ...,
) -> T: ...


async def until(
    check: Callable[[], Any],
    *,
    within: float = PATIENCE,
    every: float = 0.02,
    what: str = "the condition",
    ignoring: Ignored = ConnectionError,
) -> Any:
    """Poll *check*, a function or a coroutine function, until its result is true, and return the result.

    An error of a class in *ignoring* counts as false. Raises AssertionError after *within* seconds.
    """
    deadline = time.monotonic() + within
    while True:
        failure: Exception | None = None
        try:
            result = check()
            found = await result if isinstance(result, Awaitable) else result
            if found:
                return found
        except ignoring as error:
            failure = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} was not met within {within:g} s") from failure
        await asyncio.sleep(every)


def until_blocking(
    check: Callable[[], T],
    *,
    within: float = PATIENCE,
    every: float = 0.05,
    what: str = "the condition",
    ignoring: Ignored = ConnectionError,
) -> T:
    """Like :func:`until`, for a test without an event loop."""

    async def poll() -> T:
        return await asyncio.to_thread(check)  # which may run an event loop itself

    return asyncio.run(until(poll, within=within, every=every, what=what, ignoring=ignoring))
