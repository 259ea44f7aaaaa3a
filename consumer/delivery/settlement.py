"""The settlement of a delivery: one total, pure function from outcome to settlement.

A committed run is acked. A message that only its sender can fix is parked at once. After a transient error the
delivery is requeued without counting an attempt, and the worker pauses. An unknown error is retried later, a bounded
number of times, then parked.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

from consumer.closeout.outcome import Failed, Outcome, TransactionResult
from consumer.contract.refusals import ParkReason
from consumer.errors import Fault, UnavailableError, fault_of, lacks_privilege, one_line, refusal_in


@dataclass(frozen=True, slots=True)
class Ack:
    """Ack: nothing is left to do."""

    result: Literal["committed", "duplicate"]


@dataclass(frozen=True, slots=True)
class Park:
    """Copy the message to ``closeout.parked``, then ack."""

    reason: ParkReason
    error: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Copy the message to the retry queue with its attempts counted, then ack."""

    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class PauseAndRequeue:
    """Requeue the delivery uncounted, and stop consuming until the server is available."""

    why: str


Settlement = Ack | Park | RetryLater | PauseAndRequeue


def settle(outcome: Outcome, *, attempts: int, max_attempts: int) -> Settlement:
    """Return the settlement of a delivery with *outcome* that failed *attempts* times before."""
    match outcome:
        case TransactionResult():
            return _settle_result(outcome, attempts=attempts)
        case Failed(error):
            return _settle_failure(error, attempts=attempts, max_attempts=max_attempts)
        case _:
            assert_never(outcome)


def _settle_result(result: TransactionResult, *, attempts: int) -> Settlement:
    match result.state:
        case "committed" | "duplicate":
            return Ack(result.state)
        case "conflict":
            error = (
                "this run was already closed out from a message with different content; the stored run is unchanged: "
                f"{result.difference or 'the difference is unknown'}"
            )
            return Park("conflicting_duplicate", error, attempts)
        case "unfinished":
            # Another worker is closing it out on the legacy path, or crashed there.
            return RetryLater(attempts, "a legacy close-out of this run is unfinished")
        case _:
            assert_never(result.state)


def _settle_failure(error: BaseException, *, attempts: int, max_attempts: int) -> Settlement:
    fault = fault_of(error)
    match fault:
        case Fault.MESSAGE:
            refusal = refusal_in(error)
            return Park(refusal.reason, one_line(refusal), attempts)
        case Fault.TRANSIENT:
            # A close-out uses only the database; a failed publish does not reach this point.
            named = isinstance(error, UnavailableError)
            why = one_line(error) if named else f"PostgreSQL: {one_line(error)}"
            # PostgreSQL names the table but not the privilege; the error stays until the privilege is granted.
            return PauseAndRequeue(f"{why}; closeout doctor names the privilege" if lacks_privilege(error) else why)
        case Fault.UNKNOWN:
            failed = attempts + 1
            if failed >= max_attempts:
                return Park("attempts_exhausted", one_line(error), failed)
            return RetryLater(failed, one_line(error))
        case _:
            assert_never(fault)
