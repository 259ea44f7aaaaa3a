"""Immediate retries after transient errors: a lost connection, a deadlock, a restarting server.

The delay of a counted retry is ``RETRY_DELAY_MS`` in ``consumer/amqp/topology.py``.
"""

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

# Seconds of retries before an error counts as an outage. PostgreSQL restarts in two to five; after that deliveries are
# better off in the queue, where another worker can take them.
GIVE_UP_AFTER_SECONDS = 6.0
# Seconds. The first pause is random between 0 and 0.05, so that two deadlocked workers do not collide again.
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


async def retry_transient(
    work: Callable[[], Awaitable[T]],
    *,
    give_up_after: float = GIVE_UP_AFTER_SECONDS,
    give_up: Callable[[], bool] = lambda: False,
) -> T:
    """Return the result of *work*; retry while it fails with a transient error, then raise its last error.

    Once *give_up* returns true, the next failure is the last.
    """
    too_late = stop_after_delay(give_up_after)
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and fault_of(error) is Fault.TRANSIENT),
        stop=lambda state: too_late(state) or give_up(),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
        reraise=True,
    )

    async def once() -> T:  # tenacity awaits only coroutine functions
        return await work()

    return await retrying(once)
