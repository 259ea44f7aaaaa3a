"""Counting what policies in shadow would have done, once the runs are closed out."""

from collections.abc import Awaitable, Callable, Sequence

from consumer.closeout.attempt import TransactionResult
from consumer.closeout.inbox import Arrival
from consumer.delivery.settlement import Outcome
from consumer.metrics import Metrics

CloseOut = Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome]]]


async def count_shadows(arrivals: Sequence[Arrival], *, close_out: CloseOut, metrics: Metrics) -> Sequence[Outcome]:
    """Close out *arrivals* and count the results of policies in shadow, of runs that were committed now.

    By result only: the number of policies has no bound, and a scrape's size must have one.
    """
    outcomes = await close_out(arrivals)
    for outcome in outcomes:
        if isinstance(outcome, TransactionResult):
            for result in outcome.results:
                for shadowed in result.shadow:
                    metrics.policy_shadow.labels(shadowed).inc()
    return outcomes
