"""Trying again at once what the moment spoiled: a lost connection, a deadlock, a server that is just restarting."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_delay,
    stop_any,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from consumer.errors import Fault, fault_of

T = TypeVar("T")

# Seconds of trying before it counts as an outage. A restart of PostgreSQL takes two to five; deliveries that are held
# longer than this are better off in the queue, where another worker can have them.
GIVE_UP_AFTER_SECONDS = 6.0
# Seconds. The first pause is random between 0 and 0.05, so that two workers that deadlocked do not meet again.
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


class _When(stop_base):
    def __init__(self, true: Callable[[], bool]) -> None:
        self._true = true

    def __call__(self, retry_state: RetryCallState) -> bool:  # noqa: ARG002 - as tenacity calls it
        return self._true()


async def retry_the_moment(
    work: Callable[[], Awaitable[T]],
    *,
    give_up_after: float = GIVE_UP_AFTER_SECONDS,
    give_up: Callable[[], bool] = lambda: False,
) -> T:
    """Return what *work* returns, repeating it while its error is the moment's; its last error passes through.

    Once *give_up* says so, the next failure is the last.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and fault_of(error) is Fault.MOMENT),
        stop=stop_any(stop_after_delay(give_up_after), _When(give_up)),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
        reraise=True,
    )

    async def once() -> T:  # tenacity awaits only what it sees to be a coroutine function
        return await work()

    return await retrying(once)
