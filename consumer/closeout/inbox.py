"""The claim on ``run_completions``: the only place that decides whether a run is new."""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum
from hashlib import sha256
from typing import NamedTuple

import msgspec
from sqlalchemy import Executable, Text, func, literal, null, select
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.closeout.meaning import Meaning, meaning_of, stored_meanings
from consumer.contract.adjustments import Adjustment
from consumer.contract.trace_context import TraceContext
from consumer.errors import UnavailableError
from consumer.phases import TransactionPhase
from domains.completions import run_completions
from domains.database.statements import Compiled, columns_of, given_rows, insert_row, of_given_tenants, unnest
from domains.run import CompletedRun, RunKey

_json = msgspec.json.Encoder(order="sorted", decimal_format="number")

_FROM_RUN = (
    "tenant_id", "run_id", "agent_id", "status", "error_code", "payload_digest", "message_id", "model", "cost_usd",
    "input_tokens", "output_tokens", "started_at", "completed_at", "is_synthetic", "synthetic_scenario_id",
    "metadata", "received_at", "run_ref", "cached_input_tokens", "parent_run_id", "session_id", "step_count",
    "adjustments",
)  # fmt: skip


class Arrival(NamedTuple):
    """A run with what the claim stores next to its fields, and its trace context."""

    run: CompletedRun
    digest: bytes
    received_at: datetime
    message_id: str | None = None
    trace: TraceContext | None = None  # parent of the run's spans and events
    adjustments: tuple[Adjustment, ...] = ()

    @classmethod
    def of(cls, run: CompletedRun) -> "Arrival":
        """Return *run* as if it arrived now, for callers without a message; the digest is of the run itself."""
        return cls(run, sha256(_json.encode(run)).digest(), datetime.now(UTC))

    @property
    def key(self) -> RunKey:
        """The run's identity."""
        return self.run.key


class ClaimState(Enum):
    """The result of claiming an arrival."""

    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    UNFINISHED = "unfinished"  # a legacy close-out stopped before its last write


class Claim(NamedTuple):
    """The claim on one run: whether it is new, its stored phase and digest, and where they are needed its meaning."""

    new: bool
    phase: TransactionPhase
    digest: bytes
    finished: bool = True
    meaning: Meaning | None = None

    def difference(self, arrival: Arrival) -> str | None:
        """Return the first field in which *arrival* differs from the stored run, with both values."""
        if arrival.digest == self.digest or self.meaning is None:
            return None
        return self.meaning.difference(arrival.run)

    def state_of(self, arrival: Arrival) -> ClaimState:
        """Return the state of *arrival* under this claim."""
        if self.difference(arrival):
            return ClaimState.CONFLICT
        if self.new:
            return ClaimState.NEW
        return ClaimState.DUPLICATE if self.finished else ClaimState.UNFINISHED


def _claim_statement(phase: TransactionPhase, mode: str, *, finished: bool) -> Compiled:
    committed_at = func.clock_timestamp() if finished else null()
    more = {"phase": literal(phase.value, Text), "mode": literal(mode, Text), "committed_at": committed_at}
    rows = given_rows(run_completions, _FROM_RUN).add_columns(*more.values())
    return Compiled(
        _unless_claimed(insert(run_completions).from_select([*_FROM_RUN, *more], rows)),
        on_citus=_unless_claimed(insert_row(run_completions, _FROM_RUN).values(more)),
    )


def _unless_claimed(statement: Insert) -> Executable:
    return statement.on_conflict_do_nothing().returning(run_completions.c.tenant_id, run_completions.c.run_id)


# The row is written as COMMITTED: it is invisible before the COMMIT, and an UPDATE would write a second version.
_CLAIM_ATOMIC = _claim_statement(TransactionPhase.COMMITTED, "atomic", finished=True)
_CLAIM_LEGACY = _claim_statement(TransactionPhase.NOT_STARTED, "legacy", finished=False)

_KEYS = ("tenant_id", "run_id")
_given = unnest(run_completions, _KEYS)
_existing_runs = select(
    run_completions.c.tenant_id,
    run_completions.c.run_id,
    run_completions.c.payload_digest,
    run_completions.c.phase,
    run_completions.c.committed_at.is_not(None).label("finished"),
).join(
    _given,
    (run_completions.c.tenant_id == _given.c.tenant_id) & (run_completions.c.run_id == _given.c.run_id),
)
_EXISTING = Compiled(_existing_runs, on_citus=_existing_runs.where(of_given_tenants(run_completions)))


async def claim(
    conn: AsyncConnection, arrivals: Sequence[Arrival], *, repeated: Sequence[Arrival] = (), legacy: bool = False
) -> dict[RunKey, Claim]:
    """Claim each of *arrivals*, whose keys must differ, and return the claims by key.

    *repeated* are further messages about the same runs. If one of either has another digest than the stored run, the
    claim has the run's stored meaning.

    Waits for another transaction that holds the same key, so that two workers cannot both find a run new. Claims are
    made in key order, so that two batches cannot deadlock.
    """
    ordered = sorted(arrivals, key=_key_of)
    statement = _CLAIM_LEGACY if legacy else _CLAIM_ATOMIC
    inserted = await statement.execute(conn, columns_of(_FROM_RUN, map(_row, ordered)))
    digests = {arrival.key: arrival.digest for arrival in ordered}
    new = {RunKey(*row) for row in inserted}
    claims = {key: Claim(True, TransactionPhase.NOT_STARTED, digests[key]) for key in new}
    others = [key for key in digests if key not in new]
    if others:
        claims.update(await _existing(conn, others))
        differing = {a.key for a in (*ordered, *repeated) if not claims[a.key].new and a.digest != claims[a.key].digest}
        for key, meaning in (await stored_meanings(conn, list(differing)) if differing else {}).items():
            claims[key] = claims[key]._replace(meaning=meaning)
    if repeated:
        first = {arrival.key: arrival for arrival in ordered}
        for key in {arrival.key for arrival in repeated} & new:
            claims[key] = claims[key]._replace(meaning=meaning_of(first[key].run))
    return claims


async def _existing(conn: AsyncConnection, keys: Sequence[RunKey]) -> dict[RunKey, Claim]:
    found = await _EXISTING.execute(conn, columns_of(_KEYS, keys))
    claims = {
        RunKey(tenant_id, run_id): Claim(False, TransactionPhase(phase), digest, finished)
        for tenant_id, run_id, digest, phase, finished in found
    }
    if len(claims) < len(keys):
        # Pruned between the two statements: the next attempt finds it new.
        raise UnavailableError("a claimed run was deleted during the claim; retrying")
    return claims


def _key_of(arrival: Arrival) -> tuple[str, bytes]:
    return arrival.run.tenant_id, arrival.run.run_id.bytes


def _row(arrival: Arrival) -> tuple[object, ...]:
    run = arrival.run
    return (
        run.tenant_id, run.run_id, run.agent_id, run.status, run.error_code, arrival.digest, arrival.message_id,
        run.model, run.usage.cost_usd, run.usage.input_tokens, run.usage.output_tokens, run.started_at,
        run.completed_at, run.is_synthetic, run.synthetic_scenario_id, _json.encode(run.metadata).decode(),
        arrival.received_at, run.run_ref, run.usage.cached_input_tokens, run.parent_run_id, run.session_id,
        None if run.trace_id is None else len(run.steps),
        _json.encode(arrival.adjustments).decode() if arrival.adjustments else None,
    )  # fmt: skip
