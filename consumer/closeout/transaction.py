"""The atomic close-out: claim, incident, policy, trace, outbox, COMMIT; then publish with confirms, and mark.

Every step takes all runs of a batch and issues one statement; a single run is a batch of one.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from time import perf_counter
from typing import Literal

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.closeout import inbox
from consumer.closeout.attempt import Attempt, ObserveAttempt, unobserved
from consumer.closeout.inbox import Arrival, ClaimState
from consumer.closeout.outcome import TransactionFailed, TransactionResult
from consumer.closeout.rollbacks import try_to_record_rollbacks
from consumer.closeout.yielding import each
from consumer.contract.events import events_for
from consumer.errors import one_line
from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.outbox.publisher import EventPublisher
from consumer.phases import PhaseMachine, TransactionPhase
from consumer.postgres.driver_transaction import DriverTransaction
from domains.incidents.rules import finding_for
from domains.incidents.writes import record as record_incidents
from domains.policies.book import PolicyBook
from domains.policies.rules import evaluate
from domains.policies.writes import record as record_evaluations
from domains.run import CompletedRun, RunKey
from domains.traces.writes import complete as complete_traces

log = structlog.get_logger(__name__)


class RunCompletionTransaction:
    """Closes out runs atomically: all rows of a run are committed together, or none.

    A *publisher* publishes events after the commit; events that it cannot publish stay in the outbox.
    """

    mode = "atomic"

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        policies: PolicyBook,
        publisher: EventPublisher | None = None,
        metrics: Metrics | None = None,
        observe: ObserveAttempt = unobserved,
    ) -> None:
        self._engine = engine
        # AUTOCOMMIT: BEGIN and COMMIT go to the driver, and the mark, one statement, needs neither.
        self._sessions = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._policies = policies
        self._publisher = publisher
        self._metrics = metrics or Metrics()
        self._observe_attempt = observe

    async def execute(self, run: CompletedRun | Arrival) -> TransactionResult:
        """Close out one run; raise :class:`TransactionFailed` if it was rolled back."""
        return (await self.execute_many([run]))[0]

    async def execute_many(self, runs: Sequence[CompletedRun | Arrival]) -> list[TransactionResult]:
        """Close out *runs* in one transaction and return a result for each, in their order.

        Raises :class:`TransactionFailed` if the transaction, and so every run in it, was rolled back. The second of two
        runs with one key is a duplicate or a conflict.
        """
        arrivals = [run if isinstance(run, Arrival) else Arrival.of(run) for run in runs]
        unique: dict[RunKey, Arrival] = {}
        for arrival in arrivals:
            unique.setdefault(arrival.key, arrival)
        firsts = list(unique.values())
        repeated = [arrival for arrival in arrivals if arrival is not unique[arrival.key]]
        about = structlog.contextvars.bound_contextvars(**_log_context(firsts))
        with about, self._observe_attempt(firsts, self.mode) as on_phase:
            attempt = Attempt(firsts, repeated, PhaseMachine(on_phase=on_phase), results={key: [] for key in unique})
            await self._commit(attempt)
            self._observe(attempt)
            published = await self._publish(attempt)
        return [self._result(arrival, unique, attempt, published) for arrival in arrivals]

    async def _commit(self, attempt: Attempt) -> None:
        started = perf_counter()
        try:
            async with DriverTransaction.started(self._sessions) as transaction:
                await self._within(transaction, attempt)
        except TransactionFailed:
            raise
        except Exception as error:
            # No connection: no transaction started, so nothing is undone or recorded.
            raise self._failed(attempt, error, rolled_back=True) from error
        self._metrics.transaction_duration.labels(self.mode).observe(perf_counter() - started)

    async def _within(self, transaction: DriverTransaction, attempt: Attempt) -> None:
        try:
            await self._write(transaction.conn, attempt)
            await transaction.commit()
        except BaseException as error:
            # The shield protects the rollback from a second cancellation.
            failure = await asyncio.shield(self._undo(transaction, attempt, error))
            if isinstance(error, Exception):
                raise failure from error
            raise
        if attempt.new:
            attempt.machine.advance(TransactionPhase.COMMITTED)

    async def _write(self, conn: AsyncConnection, attempt: Attempt) -> None:
        now = datetime.now(UTC)
        attempt.claimed(await inbox.claim(conn, attempt.arrivals, repeated=attempt.repeated))
        if attempt.new:
            await self._write_new(conn, attempt, [arrival.run for arrival in attempt.new], now)
        waiting = [key for key, claim in attempt.claims.items() if claim.phase is TransactionPhase.COMMITTED]
        if waiting:
            # Committed earlier: events that a crash or another worker left unpublished.
            attempt.events += (await outbox.unpublished(conn, waiting)).events

    async def _write_new(
        self, conn: AsyncConnection, attempt: Attempt, runs: Sequence[CompletedRun], now: datetime
    ) -> None:
        book = await self._policies.current(conn)
        evaluations = await each(runs, lambda run: evaluate(run, book, now=now))
        findings = [
            finding_for(run, suppressed_by=evaluation.suppressed_by, now=now)
            for run, evaluation in zip(runs, evaluations, strict=True)
        ]
        attempt.done(TransactionPhase.INCIDENT_CREATED, await record_incidents(conn, findings))
        attempt.done(TransactionPhase.POLICY_EVALUATED, await record_evaluations(conn, evaluations))
        traces = await complete_traces(conn, runs)
        attempt.done(TransactionPhase.TRACE_COMPLETED, traces)
        for arrival, finding, evaluation in zip(attempt.new, findings, evaluations, strict=True):
            trace_id = traces[arrival.key].record_id
            attempt.events += events_for(
                arrival.run, finding, evaluation, trace_id=trace_id, now=now, trace=arrival.trace
            )
        await outbox.stage(conn, attempt.events)

    async def _undo(self, transaction: DriverTransaction, attempt: Attempt, error: BaseException) -> TransactionFailed:
        reached = attempt.machine.current
        confirmed = await transaction.roll_back(error)
        attempt.machine.advance(TransactionPhase.ROLLED_BACK if confirmed else TransactionPhase.FAILED)
        operations = tuple(reversed(attempt.operations))
        keys = [arrival.key for arrival in attempt.arrivals]
        self._metrics.rollbacks.labels(reached.value).inc(len(keys))
        self._metrics.transactions.labels(self.mode, "rolled_back" if confirmed else "failed").inc(len(keys))
        self._metrics.phase_entered.labels(attempt.machine.current.value).inc(len(keys))
        log.warning("rolled back", phase=reached, confirmed=confirmed, error=one_line(error))
        await try_to_record_rollbacks(self._engine, keys, phase=reached, operations=operations, error=error)
        return self._failed(attempt, error, rolled_back=confirmed, phase=reached)

    def _failed(
        self,
        attempt: Attempt,
        error: BaseException,
        *,
        rolled_back: bool,
        phase: TransactionPhase = TransactionPhase.NOT_STARTED,
    ) -> TransactionFailed:
        return TransactionFailed(
            phase=phase,
            results=tuple(result for results in attempt.results.values() for result in results),
            operations=tuple(reversed(attempt.operations)),
            rolled_back=rolled_back,
            cause=error,
        )

    async def _publish(self, attempt: Attempt) -> set[RunKey]:
        """Publish and mark. Never raises: the run is committed, and the relay publishes the remaining events."""
        if self._publisher is None or not attempt.events:
            return set()
        try:
            outcome = await self._publisher.publish(attempt.events)
            if outcome.failure:
                unpublished = len(attempt.events) - len(outcome.confirmed)
                log.warning("events not published; the relay retries", events=unpublished, error=outcome.failure)
            if not outcome.confirmed:
                return set()
            async with self._sessions.connect() as conn:
                done = await outbox.mark(conn, outcome.confirmed)
            self._metrics.phase_entered.labels(TransactionPhase.EVENTS_PUBLISHED.value).inc(len(done))
        except Exception as error:  # noqa: BLE001 - after COMMITTED nothing may fail the run
            log.warning("events not marked as published; the relay publishes them again", error=one_line(error))
            return set()
        return done

    def _observe(self, attempt: Attempt) -> None:
        new = attempt.new
        self._metrics.batch_runs.observe(len(attempt.arrivals))
        if not new:
            return
        self._metrics.transactions.labels(self.mode, "committed").inc(len(new))
        for phase in (*_DOMAIN_PHASES, TransactionPhase.COMMITTED):
            self._metrics.phase_entered.labels(phase.value).inc(len(new))
        now = datetime.now(UTC)
        for arrival in new:
            self._metrics.completion_lag.observe(max(0.0, (now - arrival.run.completed_at).total_seconds()))

    def _result(
        self, arrival: Arrival, first: dict[RunKey, Arrival], attempt: Attempt, published: set[RunKey]
    ) -> TransactionResult:
        claim = attempt.claims[arrival.key]
        phase = TransactionPhase.COMMITTED if claim.new else claim.phase
        if arrival.key in published:
            phase = TransactionPhase.EVENTS_PUBLISHED
        state, results = claim.state_of(arrival), tuple(attempt.results[arrival.key])
        if state is ClaimState.NEW and arrival is not first[arrival.key]:
            state = ClaimState.DUPLICATE
        if state is not ClaimState.NEW:
            results = ()
        return TransactionResult(
            arrival.run.tenant_id, arrival.run.run_id, _STATE[state], phase, results, claim.difference(arrival)
        )


_DOMAIN_PHASES = (
    TransactionPhase.INCIDENT_CREATED,
    TransactionPhase.POLICY_EVALUATED,
    TransactionPhase.TRACE_COMPLETED,
)
_STATE: dict[ClaimState, Literal["committed", "duplicate", "conflict", "unfinished"]] = {
    ClaimState.NEW: "committed",
    ClaimState.DUPLICATE: "duplicate",
    ClaimState.CONFLICT: "conflict",
    ClaimState.UNFINISHED: "unfinished",
}


def _log_context(arrivals: Sequence[Arrival]) -> dict[str, object]:
    """Return the log context of a batch: the run, or the number of runs."""
    if len(arrivals) == 1:
        run = arrivals[0].run
        return {"tenant_id": run.tenant_id, "run_id": str(run.run_id)}
    return {"runs": len(arrivals)}
