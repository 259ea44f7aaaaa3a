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

    ``phase`` is the phase that was reached, ``results`` what the domains had done by then, ``operations`` the same
    last first, as the ROLLBACK undid it. The cause is ``__cause__``, and ``rolled_back`` is false where the server
    did not confirm the rollback.
    """

    def __init__(
        self,
        *,
        phase: TransactionPhase,
        results: tuple[DomainResult, ...],
        operations: tuple[str, ...],
        rolled_back: bool,
        cause: BaseException,
    ) -> None:
        super().__init__(f"rolled back at {phase}: {type(cause).__name__}: {one_line(cause)}")
        self.phase = phase
        self.results = results
        self.operations = operations
        self.rolled_back = rolled_back
        self.cause = cause


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """What became of one run: committed now, or found to be there already.

    ``state`` is ``committed``; ``duplicate`` (closed out before, nothing written); ``conflict`` (the same identity
    with another content: nothing written); or ``unfinished`` (a legacy close-out stopped half-way, nothing written).
    ``phase`` is the run's phase now. ``results`` has one entry a domain for a run that was committed now.
    """

    tenant_id: str
    run_id: UUID
    state: Literal["committed", "duplicate", "conflict", "unfinished"]
    phase: TransactionPhase
    results: tuple[DomainResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The run was not closed out, and why."""

    error: BaseException


Outcome = TransactionResult | Failed

# Returns an outcome for each arrival, in their order; failures are values.
CloseOut = Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome]]]
