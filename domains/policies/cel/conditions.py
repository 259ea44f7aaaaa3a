"""Conditions: CEL, compiled once, evaluated within bounds.

An evaluation cannot be interrupted and holds the interpreter's lock, so its cost is estimated before it starts
(``cost.py``). A condition that is too expensive on a run of usual size is refused when it is compiled. One that is too
expensive only on a larger run is an evaluation error there. Most are cheap on every run and are not estimated again.
"""

import re
from collections.abc import Sequence

from domains.policies.cel import syntax
from domains.policies.cel.cost import CostFaultError, milliseconds
from domains.policies.cel.field_paths import overlap, reads_of
from domains.policies.cel.sizes import LARGEST, USUAL
from domains.policies.cel.visible import ENVIRONMENT, Unseen, Visible

# Characters of a condition.
CONDITION_MAX = 4_096
# Estimated milliseconds of one evaluation; the most expensive one measured took 54. It admits one filter over 1,000
# steps, for which the library copies the list for each appended element.
COST_MAX_MS = 100
# Estimated on the largest run. Below it, an evaluation allocates less than 3 MB, because copying takes 2 ns per byte.
_ALLOCATING_MS = 5

_POSITION = re.compile(r"ERROR: <input>:(?P<line>-?\d+):(?P<column>-?\d+): (?P<what>[^\n]*)")
_MISSING_KEY = re.compile(r"(Key not found in map : )[\"']?(.*?)[\"']?", re.DOTALL)


class ConditionError(ValueError):
    """A condition that does not compile. ``line`` and ``column`` count from 1, within the condition."""

    def __init__(self, what: str, *, line: int = 1, column: int = 1) -> None:
        super().__init__(f"line {line}, column {column}: {what}")
        self.line = line
        self.column = column


class EvaluationError(Exception):
    """A condition that could not be evaluated on one run; the text gives the reason and quotes nothing of the run."""


class Condition:
    """A compiled condition."""

    __slots__ = ("_allocates", "_expensive", "_expression", "reads", "text", "tree")

    def __init__(self, text: str) -> None:
        """Compile *text*; raise :class:`ConditionError` with the position of the error."""
        if len(text) > CONDITION_MAX:
            raise ConditionError(f"{len(text)} characters; expected at most {CONDITION_MAX}")
        try:
            # Without the final newline of a YAML block, so that an error at the end is on the last line.
            expression = ENVIRONMENT.compile(text.rstrip())
        except TypeError:
            raise ConditionError("the text contains half of a surrogate pair") from None
        except RuntimeError as error:
            raise _condition_error(str(error)) from None
        kind = expression.return_type().name()
        if kind not in {"BOOL", "DYN"}:
            raise ConditionError(f"the condition returns {kind.lower()}; expected true or false")
        tree, largest = _estimated(text, expression.serialize())
        # Null for a condition that is cheap enough on the largest run.
        self._expensive = tree if largest > COST_MAX_MS else None
        self._allocates = largest > _ALLOCATING_MS
        self.text = text
        self.tree = tree
        self.reads = reads_of(tree)
        self._expression = expression

    @property
    def depends_on_size(self) -> bool:
        """Return whether an evaluation asks for the size of the run, and so for all its fields."""
        return self._expensive is not None or self._allocates

    def holds(self, run: Visible) -> bool:
        """Return whether the condition is true of *run*; raise :class:`EvaluationError` if it has no result."""
        if self._expensive is not None and not run.extent.is_usual:
            estimate = milliseconds(self._expensive, run.extent)
            if estimate > COST_MAX_MS:
                raise EvaluationError(f"the run is too large for this condition: {_too_expensive(estimate)}")
        try:
            value = self._expression.eval(run.activation(alone=self._allocates))
            kind = value.type().name()
            # Other values are not converted: a list may be far larger in Python than in the library.
            answer = value.plain_value() if kind in {"BOOL", "ERROR"} else None
        except Exception as error:  # noqa: BLE001 - no error of the library may stop the worker; RuntimeError means that
            # the iteration budget is exhausted
            raise EvaluationError(str(error).split(" [")[0]) from None
        if isinstance(answer, bool):
            if not answer and run.unseen:
                self._check_seen(run.unseen)
            return answer
        if kind == "ERROR":
            raise EvaluationError(self._without_values(str(answer)))
        raise EvaluationError(f"the condition returned {kind.lower()}; expected true or false")

    def _check_seen(self, unseen: Sequence[Unseen]) -> None:
        """Raise :class:`EvaluationError` if the condition, which is not true, reads something that it saw in part."""
        for path, what in unseen:
            if any(overlap(path, read) for read in self.reads.paths):
                raise EvaluationError(f"not true of what conditions see, but {what}")

    def _without_values(self, message: str) -> str:
        """Return *message* without a key that came from the run: errors are stored and published."""
        match = _MISSING_KEY.search(message)
        found = _MISSING_KEY.fullmatch(message, match.start()) if match else None
        return message if found is None or found[2] in self.text else message[: found.end(1)] + "a key of the run"


def _condition_error(complaint: str) -> ConditionError:
    match = _POSITION.search(complaint)
    if match is None:
        return ConditionError(" ".join(complaint.split())[:300])
    # -1 if the library has no position.
    line, column = max(1, int(match["line"])), max(1, int(match["column"]))
    return ConditionError(match["what"].strip()[:300], line=line, column=column)


def _estimated(text: str, serialized: bytes) -> tuple[syntax.Node, int]:
    """Return a condition's tree and estimated milliseconds on the largest run; raise if a usual run is too much."""
    try:
        tree = syntax.read(serialized)
        largest = milliseconds(tree, LARGEST)
        usual = milliseconds(tree, USUAL) if largest > COST_MAX_MS else 0
    except CostFaultError as fault:
        before = text[: syntax.offset_of(serialized, fault.at)]
        place = {"line": before.count("\n") + 1, "column": len(before) - before.rfind("\n")}
        raise ConditionError(str(fault), **place) from None
    except ValueError as error:
        raise ConditionError(f"cannot estimate cost: {error}") from None
    if usual > COST_MAX_MS:
        raise ConditionError(f"too expensive: {_too_expensive(usual, f' on a run of {USUAL.steps} steps')}")
    return tree, largest


def _too_expensive(estimate: int, where: str = "") -> str:
    time = f"up to {estimate:,} ms" if estimate < 1_000_000 else "more than 1,000 s"
    return f"{time}{where} (limit {COST_MAX_MS} ms)"
