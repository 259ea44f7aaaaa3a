"""The flag that chooses: which runs are closed out atomically, which on the legacy path, and what falls back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.outcome import CloseOut, Failed, Outcome, TransactionFailed, TransactionResult
from consumer.closeout.retries import retry_transient
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.errors import Fault, fault_of, lies_in_data, one_line
from consumer.metrics import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Who is closed out atomically: with *enabled* the tenants named, or all if none is."""

    enabled: bool
    tenants: frozenset[str] = frozenset()
    fallback: bool = False

    def is_atomic(self, tenant_id: str) -> bool:
        """Say whether runs of *tenant_id* go through the coordinator."""
        return self.enabled and (not self.tenants or tenant_id in self.tenants)


class Dispatcher:
    """Closes out runs by the path that each one's tenant is on."""

    def __init__(
        self,
        *,
        coordinator: RunCompletionTransaction,
        legacy: LegacyCloseOut,
        rollout: Rollout,
        metrics: Metrics,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._coordinator = coordinator
        self._legacy = legacy
        self._rollout = rollout
        self._metrics = metrics
        # Says that the worker is leaving or has paused: nothing that failed is then tried again in place.
        self._give_up = give_up

    async def close_out(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Return an outcome for each of *arrivals*, in order; failures are values, only cancellation raises."""
        atomic = [a for a in arrivals if self._rollout.is_atomic(a.run.tenant_id)]
        outcomes: dict[int, Outcome] = {}
        if atomic:
            for arrival, outcome in zip(atomic, await isolate(self._atomically, atomic), strict=True):
                outcomes[id(arrival)] = await self._second_path(arrival, outcome)
        away: Outcome | None = None
        for arrival in arrivals:
            if id(arrival) not in outcomes:
                # One by one, each would wait for a database that is away, and hold its delivery.
                outcome = outcomes[id(arrival)] = away or await self._legacy_way(arrival)
                away = outcome if _is_away(outcome) else None
        return [outcomes[id(arrival)] for arrival in arrivals]

    async def _atomically(self, arrivals: Sequence[Arrival]) -> Sequence[Outcome]:
        return await retry_transient(lambda: self._coordinator.execute_many(arrivals), give_up=self._give_up)

    async def _second_path(self, arrival: Arrival, outcome: Outcome) -> Outcome:
        """Finish on the legacy path what was begun there, and what falls back to it."""
        if isinstance(outcome, TransactionResult):
            return await self._legacy_way(arrival) if outcome.state == "unfinished" else outcome
        error = outcome.error
        if not (self._rollout.fallback and isinstance(error, TransactionFailed)):
            return outcome
        if _is_away(outcome):
            return outcome  # without a database there is no other path either
        log.warning(
            "falling back to non-atomic writes",
            tenant_id=arrival.run.tenant_id, run_id=str(arrival.run.run_id), phase=error.phase, error=one_line(error),
        )  # fmt: skip
        self._metrics.legacy_fallbacks.inc()
        return await self._legacy_way(arrival)

    async def _legacy_way(self, arrival: Arrival) -> Outcome:
        try:
            return await retry_transient(lambda: self._legacy.execute(arrival), give_up=self._give_up)
        except Exception as error:  # noqa: BLE001 - settlement decides what it is
            return Failed(error)


def _is_away(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and fault_of(outcome.error) is Fault.TRANSIENT


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
