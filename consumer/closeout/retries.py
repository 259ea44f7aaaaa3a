"""Trying again at once what the moment spoiled: a lost connection, a deadlock, a server that is just restarting."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from consumer.errors import Fault, fault_of

T = TypeVar("T")

# Seconds of trying before it counts as an outage. A restart of PostgreSQL takes two to five; deliveries that are held
# longer than this are better off in the queue, where another worker can have them.
GIVE_UP_AFTER_SECONDS = 6.0
# Seconds. The first pause is random between 0 and 0.05, so that two workers that deadlocked do not meet again.
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


async def retry_transient(
    work: Callable[[], Awaitable[T]],
    *,
    give_up_after: float = GIVE_UP_AFTER_SECONDS,
    give_up: Callable[[], bool] = lambda: False,
) -> T:
    """Return what *work* returns, repeating it while its error is the moment's; its last error passes through.

    Once *give_up* says so, the next failure is the last.
    """
    too_late = stop_after_delay(give_up_after)
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and fault_of(error) is Fault.TRANSIENT),
        stop=lambda state: too_late(state) or give_up(),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
        reraise=True,
    )

    async def once() -> T:  # tenacity awaits only what it sees to be a coroutine function
        return await work()

    return await retrying(once)
