"""A batch shares a commit, not a fate: the one run that cannot be written is found by halving, the others commit."""

from collections.abc import Awaitable, Callable, Sequence

from consumer.closeout.inbox import Arrival
from consumer.delivery.settlement import Failed, Outcome
from consumer.errors import lies_in_data

CloseOut = Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome]]]


async def isolate(close_out: CloseOut, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """Return an outcome for each of *arrivals*, in order; only those that fail alone have failed.

    An infrastructure error is nobody's fault: then the whole part has failed and nothing is isolated.
    """
    try:
        return list(await close_out(arrivals))
    except Exception as error:  # noqa: BLE001 - settlement decides what it is
        if len(arrivals) == 1 or not lies_in_data(error):
            return [Failed(error)] * len(arrivals)
    middle = len(arrivals) // 2
    return await isolate(close_out, arrivals[:middle]) + await isolate(close_out, arrivals[middle:])
