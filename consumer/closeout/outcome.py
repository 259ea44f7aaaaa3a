"""The result of closing out one run, or the error that rolled it back."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from consumer.closeout.inbox import Arrival
from consumer.errors import one_line
from consumer.phases import TransactionPhase
from domains.result import DomainResult


class TransactionFailed(Exception):  # noqa: N818 - the contract's name
    """An attempt to close out runs was rolled back.

    ``phase`` is the phase reached, ``results`` the domain results by then, and ``operations`` the rollback stack, last
    operation first. The error is ``__cause__``. ``rolled_back`` is false if the server did not confirm the rollback.
    *partly_stored*: the legacy path has stored the run up to ``phase``, and the message reports it.
    """

    def __init__(
        self,
        *,
        phase: TransactionPhase,
        results: tuple[DomainResult, ...],
        operations: tuple[str, ...],
        rolled_back: bool,
        cause: BaseException,
        partly_stored: bool = False,
    ) -> None:
        stored = f"partly stored, up to {phase}: a replay of the message completes the run; " if partly_stored else ""
        super().__init__(f"{stored}rolled back at {phase}: {type(cause).__name__}: {one_line(cause)}")
        self.phase = phase
        self.results = results
        self.operations = operations
        self.rolled_back = rolled_back
        self.cause = cause


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """The result for one run: committed now, or already stored.

    ``state`` is ``committed``; ``duplicate`` (already closed out); ``conflict`` (same identity, different content); or
    ``unfinished`` (a legacy close-out stopped before its last write). Only ``committed`` wrote anything. ``phase`` is
    the run's current phase. ``results`` has one entry per domain if the run was committed now. ``difference`` names
    the first field of a conflict that differs from the stored run, with both values.
    """

    tenant_id: str
    run_id: UUID
    state: Literal["committed", "duplicate", "conflict", "unfinished"]
    phase: TransactionPhase
    results: tuple[DomainResult, ...] = ()
    difference: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The run was not closed out because of *error*."""

    error: BaseException


Outcome = TransactionResult | Failed

# Returns an outcome for each arrival, in order; failures are values.
CloseOut = Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome]]]
