"""The legacy, non-atomic path: three writes, each in a separate transaction. The coordinator replaces it gradually.

A crash between two writes leaves a run partly closed out. Each write stores its phase in the same transaction, so that
a redelivery resumes where the last one stopped.
"""

from datetime import UTC, datetime
from time import perf_counter

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.closeout import inbox
from consumer.closeout.attempt import ObserveAttempt, unobserved
from consumer.closeout.inbox import Arrival, ClaimState
from consumer.closeout.outcome import TransactionFailed, TransactionResult
from consumer.closeout.rollbacks import try_to_record_rollbacks
from consumer.contract.events import events_for
from consumer.errors import Fault, UnavailableError, fault_of, one_line
from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.outbox.publisher import EventPublisher
from consumer.phases import OnPhase, PhaseMachine, TransactionPhase
from domains.completions import run_completions
from domains.incidents.rules import finding_for
from domains.incidents.writes import record_once, result_of, stored_finding
from domains.policies.book import PolicyBook
from domains.policies.rules import evaluate
from domains.policies.writes import record_once as record_evaluation_once
from domains.policies.writes import result_of as evaluation_result_of
from domains.result import DomainResult
from domains.run import RunKey
from domains.traces.writes import complete

log = structlog.get_logger(__name__)

_P = TransactionPhase
_NEXT = {
    _P.NOT_STARTED: _P.INCIDENT_CREATED,
    _P.INCIDENT_CREATED: _P.POLICY_EVALUATED,
    _P.POLICY_EVALUATED: _P.TRACE_COMPLETED,
    _P.TRACE_COMPLETED: _P.COMMITTED,
}


class LegacyCloseOut:
    """Closes out one run at a time, one write at a time. Safe to repeat at any point."""

    mode = "legacy"

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
        self._policies = policies
        self._publisher = publisher
        self._metrics = metrics or Metrics()
        self._observe_attempt = observe

    async def execute(self, arrival: Arrival) -> TransactionResult:
        """Close out *arrival*, or finish it; raise :class:`TransactionFailed` if a write fails."""
        run = arrival.run
        about = structlog.contextvars.bound_contextvars(tenant_id=run.tenant_id, run_id=str(run.run_id), mode=self.mode)
        with about, self._observe_attempt([arrival], self.mode) as on_phase:
            return await self._execute(arrival, on_phase)

    async def _execute(self, arrival: Arrival, on_phase: OnPhase | None) -> TransactionResult:
        started = perf_counter()
        run = arrival.run
        async with self._engine.begin() as conn:
            claim = (await inbox.claim(conn, [arrival], legacy=True))[arrival.key]
        state = claim.state_of(arrival)
        if state is ClaimState.CONFLICT:
            difference = claim.difference(arrival)
            return TransactionResult(run.tenant_id, run.run_id, "conflict", claim.phase, difference=difference)
        results: list[DomainResult] = []
        phase = claim.phase
        while phase in _NEXT:
            phase = await self._step(arrival, phase, results)
            if on_phase is not None:
                on_phase(phase)
        if state is not ClaimState.DUPLICATE:
            self._metrics.transactions.labels(self.mode, "committed").inc()
            self._metrics.transaction_duration.labels(self.mode).observe(perf_counter() - started)
        phase = await self._publish(arrival.key, phase)
        if state is ClaimState.DUPLICATE:
            return TransactionResult(run.tenant_id, run.run_id, "duplicate", phase)
        return TransactionResult(run.tenant_id, run.run_id, "committed", phase, tuple(results))

    async def _step(self, arrival: Arrival, phase: TransactionPhase, results: list[DomainResult]) -> TransactionPhase:
        """Make the write after *phase* and store its phase in one transaction; return the phase that is now stored."""
        try:
            async with self._engine.begin() as conn:
                stored = await _lock(conn, arrival.key)
                if stored is not phase:
                    return stored  # another worker has advanced it meanwhile
                machine = PhaseMachine(stored)
                results += await self._write(conn, arrival, machine.advance(_NEXT[stored]))
                await _store(conn, arrival.key, machine.current)
        except Exception as error:
            self._metrics.rollbacks.labels(phase.value).inc()
            self._metrics.transactions.labels(self.mode, "rolled_back").inc()
            log.warning("write failed; a redelivery resumes from this phase", phase=phase, error=one_line(error))
            if fault_of(error) is not Fault.TRANSIENT:
                # reconcile reports the run at once by this record.
                await try_to_record_rollbacks(self._engine, [arrival.key], phase=phase, operations=(), error=error)
            raise TransactionFailed(
                phase=phase, results=tuple(results), operations=(), rolled_back=True, cause=error, partly_stored=True
            ) from error
        self._metrics.phase_entered.labels(machine.current.value).inc()
        return machine.current

    async def _write(self, conn: AsyncConnection, arrival: Arrival, phase: TransactionPhase) -> list[DomainResult]:
        run, now = arrival.run, datetime.now(UTC)
        # Policies may have changed since the previous write: a cost of the non-atomic path.
        evaluation = evaluate(run, await self._policies.current(conn))
        match phase:
            case _P.INCIDENT_CREATED:
                finding = finding_for(run, suppressed_by=evaluation.suppressed_by, now=now)
                return [result_of(await record_once(conn, finding))]
            case _P.POLICY_EVALUATED:
                kept = await record_evaluation_once(conn, evaluation)
                return [evaluation_result_of(kept)]
            case _P.TRACE_COMPLETED:
                return list((await complete(conn, [run])).values())
            case _:
                found = await stored_finding(conn, run.key)
                if found is None:
                    raise UnavailableError("the incident of a partly closed-out run was deleted; retrying")
                kept = await record_evaluation_once(conn, evaluation)
                trace_id = (await complete(conn, [run]))[run.key].record_id  # the trace is complete: reads its id
                events = events_for(run, found, kept, trace_id=trace_id, now=now, trace=arrival.trace)
                await outbox.stage(conn, events)
                return []

    async def _publish(self, key: RunKey, phase: TransactionPhase) -> TransactionPhase:
        if self._publisher is None or phase is not _P.COMMITTED:
            return phase
        try:
            async with self._engine.connect() as conn:
                events = (await outbox.unpublished(conn, [key])).events
            outcome = await self._publisher.publish(events)
            if outcome.confirmed:
                async with self._engine.begin() as conn:
                    done = await outbox.mark(conn, outcome.confirmed)
                if key in done:
                    self._metrics.phase_entered.labels(_P.EVENTS_PUBLISHED.value).inc()
                    return _P.EVENTS_PUBLISHED
        except Exception as error:  # noqa: BLE001 - after COMMITTED nothing may fail the run; the relay goes on
            log.warning("events not published; the relay retries", error=one_line(error))
        return phase


async def _lock(conn: AsyncConnection, key: RunKey) -> TransactionPhase:
    row = await conn.execute(
        select(run_completions.c.phase)
        .where(run_completions.c.tenant_id == key.tenant_id, run_completions.c.run_id == key.run_id)
        .with_for_update()
    )
    return TransactionPhase(row.scalar_one())


async def _store(conn: AsyncConnection, key: RunKey, phase: TransactionPhase) -> None:
    values: dict[str, object] = {"phase": phase.value}
    if phase is TransactionPhase.COMMITTED:
        values["committed_at"] = func.statement_timestamp()  # Citus refuses clock_timestamp() in an UPDATE
    await conn.execute(
        update(run_completions)
        .where(run_completions.c.tenant_id == key.tenant_id, run_completions.c.run_id == key.run_id)
        .values(**values)
    )
