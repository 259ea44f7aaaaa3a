"""How a delivery is settled: one total, pure function from outcome to settlement.

The table in words: what is committed is acked; what the sender must mend is parked at once; the weather is nobody's
fault, so the delivery goes back and the worker pauses; what nobody foresaw is tried again later, a bounded number of
times, then parked.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

from consumer.closeout.outcome import Failed, Outcome, TransactionResult
from consumer.contract.refusals import ParkReason
from consumer.errors import Fault, UnavailableError, fault_of, lacks_a_right, one_line, refusal_in


@dataclass(frozen=True, slots=True)
class Ack:
    """Done with it."""

    result: Literal["committed", "duplicate"]


@dataclass(frozen=True, slots=True)
class Park:
    """Keep it whole in ``closeout.parked``, then ack."""

    reason: ParkReason
    error: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Hand it to the retry queue with its attempts counted, then ack."""

    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class PauseAndRequeue:
    """Give it back uncounted and stop consuming until the server is back."""

    why: str


Settlement = Ack | Park | RetryLater | PauseAndRequeue


def settle(outcome: Outcome, *, attempts: int, max_attempts: int) -> Settlement:
    """Return what to do with a delivery that failed *attempts* times before and now came to *outcome*."""
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
            error = "this run was closed out before from a message with another content; that one stands"
            return Park("conflicting_duplicate", error, attempts)
        case "unfinished":
            # Another worker is in the middle of it on the legacy path, or died there.
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
            # A close-out speaks to the database only; what fails to be published is left to the relay.
            named = isinstance(error, UnavailableError)
            why = one_line(error) if named else f"PostgreSQL: {one_line(error)}"
            # The server says on which table, and not which right; it stays away until somebody grants it.
            return PauseAndRequeue(f"{why}; closeout doctor names the right" if lacks_a_right(error) else why)
        case Fault.UNKNOWN:
            failed = attempts + 1
            if failed >= max_attempts:
                return Park("attempts_exhausted", one_line(error), failed)
            return RetryLater(failed, one_line(error))
        case _:
            assert_never(fault)
