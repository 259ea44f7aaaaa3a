"""One attempt to close out a batch, and its results per run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from consumer.closeout.inbox import Arrival, Claim
from consumer.contract.events import OutboxEvent
from consumer.phases import OnPhase, PhaseMachine, TransactionPhase
from domains.result import DomainResult
from domains.run import RunKey

# Opened around one attempt with its runs and mode; may yield a function that is called at each phase.
ObserveAttempt = Callable[[Sequence[Arrival], str], AbstractContextManager[OnPhase | None]]


def unobserved(_arrivals: Sequence[Arrival], _mode: str) -> AbstractContextManager[None]:
    """Observe nothing."""
    return nullcontext()


@dataclass(slots=True)
class Attempt:
    """The state of one attempt: its phase, its writes, and the events it will publish."""

    arrivals: Sequence[Arrival]
    repeated: Sequence[Arrival] = ()  # further messages about these runs
    machine: PhaseMachine = field(default_factory=PhaseMachine)
    claims: dict[RunKey, Claim] = field(default_factory=dict)
    new: list[Arrival] = field(default_factory=list)
    results: dict[RunKey, list[DomainResult]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    events: list[OutboxEvent] = field(default_factory=list)

    def claimed(self, claims: dict[RunKey, Claim]) -> None:
        """Store the claim of each arrival."""
        self.claims = claims
        self.new = [arrival for arrival in self.arrivals if claims[arrival.key].new]

    def done(self, phase: TransactionPhase, results: dict[RunKey, DomainResult]) -> None:
        """Store the result for each run, and move to *phase*."""
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
