"""The phases of a close-out: one table of legal moves.

Theory. A close-out is a sequence of five steps. Each phase is named in the past tense: it states what is done, so a
stored phase is a fact. From any phase before COMMITTED the attempt may end in ROLLED_BACK. After COMMITTED nothing can
be undone, and the only move left is to EVENTS_PUBLISHED.

The ugly parts. FAILED means "unknown", not "the run failed": the connection was lost before the server confirmed the
rollback, or COMMIT was sent and no response came. The claim of the run's next delivery finds the truth. And only the
legacy path stores NOT_STARTED: it commits the inbox row before any domain write.
"""

from collections.abc import Callable
from enum import StrEnum
from types import MappingProxyType


class TransactionPhase(StrEnum):
    """The last phase that a close-out has completed."""

    NOT_STARTED = "NOT_STARTED"
    INCIDENT_CREATED = "INCIDENT_CREATED"
    POLICY_EVALUATED = "POLICY_EVALUATED"
    TRACE_COMPLETED = "TRACE_COMPLETED"
    COMMITTED = "COMMITTED"
    EVENTS_PUBLISHED = "EVENTS_PUBLISHED"
    ROLLED_BACK = "ROLLED_BACK"
    FAILED = "FAILED"


# Called with each phase as it is entered.
OnPhase = Callable[[TransactionPhase], None]

_P = TransactionPhase
_UNDO = frozenset({_P.ROLLED_BACK, _P.FAILED})

LEGAL_MOVES: MappingProxyType[TransactionPhase, frozenset[TransactionPhase]] = MappingProxyType(
    {
        _P.NOT_STARTED: _UNDO | {_P.INCIDENT_CREATED},
        _P.INCIDENT_CREATED: _UNDO | {_P.POLICY_EVALUATED},
        _P.POLICY_EVALUATED: _UNDO | {_P.TRACE_COMPLETED},
        _P.TRACE_COMPLETED: _UNDO | {_P.COMMITTED},
        _P.COMMITTED: frozenset({_P.EVENTS_PUBLISHED}),
        _P.EVENTS_PUBLISHED: frozenset(),
        _P.ROLLED_BACK: frozenset(),
        _P.FAILED: frozenset(),
    }
)


class IllegalMoveError(RuntimeError):
    """A move that is not in the table: a bug, never an infrastructure error."""

    def __init__(self, current: TransactionPhase, target: TransactionPhase) -> None:
        allowed = ", ".join(sorted(LEGAL_MOVES[current])) or "none, the phase is final"
        super().__init__(f"cannot move from {current} to {target}; legal moves: {allowed}")
        self.current = current
        self.target = target


class PhaseMachine:
    """The phase of one attempt: NOT_STARTED, or a stored phase that is resumed. *on_phase* is called at each move."""

    __slots__ = ("_current", "_on_phase")

    def __init__(
        self,
        start: TransactionPhase = TransactionPhase.NOT_STARTED,
        *,
        on_phase: OnPhase | None = None,
    ) -> None:
        self._current = start
        self._on_phase = on_phase

    @property
    def current(self) -> TransactionPhase:
        """The current phase."""
        return self._current

    def advance(self, target: TransactionPhase) -> TransactionPhase:
        """Move to *target* and return it; raise :class:`IllegalMoveError`, and stay, if the move is illegal."""
        if target not in LEGAL_MOVES[self._current]:
            raise IllegalMoveError(self._current, target)
        self._current = target
        if self._on_phase is not None:
            self._on_phase(target)
        return target


def diagram() -> str:
    """Return the table of moves as a Mermaid state diagram, for the guide."""
    moves = [f"    {current} --> {target}" for current, targets in LEGAL_MOVES.items() for target in sorted(targets)]
    finals = [f"    {phase} --> [*]" for phase, targets in LEGAL_MOVES.items() if not targets]
    return "\n".join(["stateDiagram-v2", "    [*] --> NOT_STARTED", *moves, *finals])
