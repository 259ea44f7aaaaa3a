"""Chooses the path of each run: atomic or legacy, by the rollout settings; isolates a bad run in a batch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.outcome import CloseOut, Failed, Outcome, TransactionFailed, TransactionResult
from consumer.closeout.retries import retry_transient
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.contract.adjustments import fields_of
from consumer.errors import Fault, fault_of, lies_in_data, one_line
from consumer.metrics import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rollout:
    """The rollout settings: if *enabled*, runs of *tenants* are atomic, or of all tenants if the set is empty."""

    enabled: bool
    tenants: frozenset[str] = frozenset()
    fallback: bool = False

    def is_atomic(self, tenant_id: str) -> bool:
        """Return whether runs of *tenant_id* are closed out atomically."""
        return self.enabled and (not self.tenants or tenant_id in self.tenants)


class Dispatcher:
    """Closes out each run on its tenant's path."""

    def __init__(
        self,
        *,
        coordinator: RunCompletionTransaction,
        legacy: LegacyCloseOut,
        rollout: Rollout,
        metrics: Metrics,
        give_up: Callable[[], bool] = lambda: False,
        by_tenant: Callable[[], bool] = lambda: False,
    ) -> None:
        """Close out each tenant's runs in separate transactions while *by_tenant* returns true."""
        self._coordinator = coordinator
        self._legacy = legacy
        self._rollout = rollout
        self._metrics = metrics
        # Returns true once the worker stops or pauses: failures are then not retried in place.
        self._give_up = give_up
        self._by_tenant = by_tenant

    async def close_out(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Return an outcome for each of *arrivals*, in order; failures are values, only cancellation raises."""
        atomic = [a for a in arrivals if self._rollout.is_atomic(a.run.tenant_id)]
        outcomes: dict[int, Outcome] = {}
        # After one transient failure the others fail with it, or each would wait for the database in turn.
        outage: Outcome | None = None
        for group in self._groups(atomic):
            closed = [outage] * len(group) if outage else await isolate(self._atomically, group)
            for arrival, outcome in zip(group, closed, strict=True):
                outcomes[id(arrival)] = await self._legacy_if_needed(arrival, outcome)
            outage = next(filter(_is_transient, closed), None)
        outage = None
        for arrival in arrivals:
            if id(arrival) not in outcomes:
                outcome = outcomes[id(arrival)] = outage or await self._legacy_way(arrival)
                outage = outcome if _is_transient(outcome) else None
        return [outcomes[id(arrival)] for arrival in arrivals]

    def _groups(self, arrivals: Sequence[Arrival]) -> Iterable[Sequence[Arrival]]:
        """Return the batches that *arrivals* are closed out in, one transaction each.

        A transaction about one tenant changes rows on one node of Citus; one about several on all of them.
        """
        if not self._by_tenant():
            return [arrivals] if arrivals else []
        groups: dict[str, list[Arrival]] = {}
        for arrival in arrivals:
            groups.setdefault(arrival.run.tenant_id, []).append(arrival)
        return groups.values()

    async def _atomically(self, arrivals: Sequence[Arrival]) -> Sequence[Outcome]:
        return await retry_transient(lambda: self._coordinator.execute_many(arrivals), give_up=self._give_up)

    async def _legacy_if_needed(self, arrival: Arrival, outcome: Outcome) -> Outcome:
        """Finish a legacy close-out on the legacy path, and fall back to it where that is enabled."""
        if isinstance(outcome, TransactionResult):
            return await self._legacy_way(arrival) if outcome.state == "unfinished" else outcome
        error = outcome.error
        if not (self._rollout.fallback and isinstance(error, TransactionFailed)):
            return outcome
        if _is_transient(outcome):
            return outcome  # the legacy path needs the database too
        log.warning(
            "falling back to non-atomic writes",
            tenant_id=arrival.run.tenant_id, run_id=str(arrival.run.run_id), phase=error.phase, error=one_line(error),
        )  # fmt: skip
        self._metrics.legacy_fallbacks.inc()
        return await self._legacy_way(arrival)

    async def _legacy_way(self, arrival: Arrival) -> Outcome:
        try:
            return await retry_transient(lambda: self._legacy.execute(arrival), give_up=self._give_up)
        except Exception as error:  # noqa: BLE001 - a failure is a value here; settlement parks, retries or requeues
            return Failed(error)


def _is_transient(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and fault_of(outcome.error) is Fault.TRANSIENT


async def isolate(close_out: CloseOut, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """Return an outcome for each of *arrivals*, in order; a run has failed only if it fails alone.

    A batch shares a commit, not a fate: when an error may lie in the data, the batch is retried in halves. A transient
    error fails the whole part, and nothing is isolated.
    """
    try:
        return list(await close_out(arrivals))
    except Exception as error:  # noqa: BLE001 - a failure is a value here; settlement parks, retries or requeues
        if len(arrivals) == 1 or not lies_in_data(error):
            return [Failed(error)] * len(arrivals)
    middle = len(arrivals) // 2
    return await isolate(close_out, arrivals[:middle]) + await isolate(close_out, arrivals[middle:])


async def count_details(arrivals: Sequence[Arrival], *, close_out: CloseOut, metrics: Metrics) -> Sequence[Outcome]:
    """Close out *arrivals*; count the adjustments, the evaluations and the shadow policies' results of new runs.

    No policy is a label: their number is unbounded, and a scrape must be bounded.
    """
    outcomes = await close_out(arrivals)
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        if isinstance(outcome, TransactionResult) and outcome.state == "committed":
            for field in fields_of(arrival.adjustments):
                metrics.message_adjustments.labels(field).inc()
            for result in outcome.results:
                if result.domain == "policies":
                    metrics.policy_evaluations.labels(result.detail).inc()
                for shadowed in result.shadow:
                    metrics.policy_shadow.labels(shadowed).inc()
    return outcomes
