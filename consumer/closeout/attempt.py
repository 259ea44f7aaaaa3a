"""One try at closing out a batch, and what became of each of its runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from consumer.closeout.inbox import Arrival, Claim
from consumer.contract.events import OutboxEvent
from consumer.phases import PhaseMachine, TransactionPhase
from domains.result import DomainResult
from domains.run import RunKey


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


@dataclass(slots=True)
class Attempt:
    """One try at a batch: where it stands, what it has done, and what it will tell downstream."""

    arrivals: Sequence[Arrival]
    machine: PhaseMachine = field(default_factory=PhaseMachine)
    claims: dict[RunKey, Claim] = field(default_factory=dict)
    new: list[Arrival] = field(default_factory=list)
    results: dict[RunKey, list[DomainResult]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    events: list[OutboxEvent] = field(default_factory=list)

    def claimed(self, claims: dict[RunKey, Claim]) -> None:
        """Note what the inbox said of each arrival."""
        self.claims = claims
        self.new = [arrival for arrival in self.arrivals if claims[arrival.key].new]

    def done(self, phase: TransactionPhase, results: dict[RunKey, DomainResult]) -> None:
        """Note what was done for each run, and move to *phase*."""
        for key, result in results.items():
            self.results[key].append(result)
        self.operations.append(f"{phase}: {_summary(results)}")
        self.machine.advance(phase)


def _summary(results: dict[RunKey, DomainResult]) -> str:
    counts: dict[str, int] = {}
    for result in results.values():
        word = f"{result.domain} {result.action}"
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())
