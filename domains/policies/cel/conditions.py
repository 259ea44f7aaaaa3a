"""Conditions: CEL, compiled once, evaluated within bounds.

An evaluation cannot be interrupted and holds the interpreter's lock, so its cost is estimated before it starts
(``cost.py``). A condition that is too expensive on a run of usual size is refused when it is compiled. One that is too
expensive only on a larger run is an evaluation error there. Most are cheap on every run and are not estimated again.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from cel_expr_python import cel

from domains.policies.cel import syntax
from domains.policies.cel.cost import CostFaultError, milliseconds
from domains.policies.cel.field_paths import Path, overlap, reads_of
from domains.policies.cel.sizes import LARGEST, STEP_TEXTS, TEXT_MAX_BYTES, USUAL, Extent, extent_of
from domains.run import VISIBLE_STEPS, CompletedRun, Step

# Characters of a condition.
CONDITION_MAX = 4_096
# Characters of each string that conditions see: an error message may have a megabyte, and a condition may match it
# 10,000 times. UTF-8 has at most four bytes per character.
VISIBLE_MAX = TEXT_MAX_BYTES // 4
# Estimated milliseconds of one evaluation; the most expensive one measured took 54. It admits one filter over 1,000
# steps, for which the library copies the list for each appended element.
COST_MAX_MS = 100
# Estimated on the largest run. Below it, an evaluation allocates less than 3 MB, because copying takes 2 ns per byte.
_ALLOCATING_MS = 5

_INT64 = range(-(2**63), 2**63)
_POSITION = re.compile(r"ERROR: <input>:(?P<line>-?\d+):(?P<column>-?\d+): (?P<what>[^\n]*)")
_MISSING_KEY = re.compile(r"(Key not found in map : )[\"']?(.*?)[\"']?", re.DOTALL)
# The library treats the ends of Python's calendar as infinite, and rounds the last second out of it.
_EARLIEST = datetime.min.replace(tzinfo=UTC) + timedelta(microseconds=1)
_LATEST = datetime.max.replace(tzinfo=UTC, microsecond=0)

# The library refuses a time inside a map but not as a variable: with these, run.completed_at is a time.
_TIMES = ("started_at", "completed_at")
# The fields of a run that conditions can read.
_FIELDS = frozenset((*CompletedRun.__struct_fields__, "duration_ms", "step_count"))
_env = cel.NewEnv(
    variables={
        "run": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
        **{f"run.{name}": cel.Type.TIMESTAMP for name in _TIMES},
    }
)


# A part of a run that conditions do not see completely: its path, and what of it is not seen.
Unseen = tuple[Path, str]


class ConditionError(ValueError):
    """A condition that does not compile. ``line`` and ``column`` count from 1, within the condition."""

    def __init__(self, what: str, *, line: int = 1, column: int = 1) -> None:
        super().__init__(f"line {line}, column {column}: {what}")
        self.line = line
        self.column = column


class EvaluationError(Exception):
    """A condition that could not be evaluated on one run; the text gives the reason and quotes nothing of the run."""


class Visible:
    """A run as conditions see it, converted once for all of them.

    *unknown* fields are omitted: a condition that needs one has no result. With *needed*, the fields that the
    conditions read together (``Reads.fields``), only those are converted: most conditions read three or four, and
    converting all takes longer than four evaluations.
    """

    __slots__ = ("_extent", "_run", "_shared", "_variables", "unknown", "unseen")

    def __init__(
        self,
        run: CompletedRun,
        *,
        unknown: frozenset[str] = frozenset(),
        needed: frozenset[str] = _FIELDS,
    ) -> None:
        self._run = run
        self.unknown = unknown
        # What is longer than conditions see, among the fields that they need.
        self.unseen: list[Unseen] = []
        self._variables: dict[str, Any] = {
            "run": visible_fields(run, needed - unknown if unknown else needed, self.unseen),
            **{f"run.{name}": _time(getattr(run, name)) for name in _TIMES},
        }
        self._shared = _env.Activation(self._variables)
        self._extent: Extent | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that conditions see, by name."""
        return self._variables["run"]  # type: ignore[no-any-return]

    @property
    def extent(self) -> Extent:
        """The size of the run; measured when a condition needs it."""
        if self._extent is None:
            self._extent = extent_of(visible_fields(self._run))
        return self._extent

    def activation(self, *, alone: bool) -> cel.Activation:
        """Return the run in the library's form: shared by all conditions, or for one evaluation only.

        Memory of an evaluation is freed with its activation: 18 MB for one filter over 1,000 steps. A new activation
        costs a conversion of the run: 2 ms for 1,000 steps.
        """
        return _env.Activation(self._variables) if alone and not self.extent.is_usual else self._shared


class Condition:
    """A compiled condition."""

    __slots__ = ("_allocates", "_expensive", "_expression", "reads", "text", "tree")

    def __init__(self, text: str) -> None:
        """Compile *text*; raise :class:`ConditionError` with the position of the error."""
        if len(text) > CONDITION_MAX:
            raise ConditionError(f"{len(text)} characters; expected at most {CONDITION_MAX}")
        try:
            # Without the final newline of a YAML block, so that an error at the end is on the last line.
            expression = _env.compile(text.rstrip())
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


def visible_fields(
    run: CompletedRun, names: frozenset[str] = _FIELDS, unseen: list[Unseen] | None = None
) -> dict[str, Any]:
    """Return the fields called *names* as CEL values, ``duration_ms`` and ``step_count`` included.

    Times are RFC 3339 text, costs are doubles, strings are cut to ``VISIBLE_MAX`` characters, steps to the first
    ``VISIBLE_STEPS``, and integers beyond 64 bits become doubles. What was cut is added to *unseen*.
    """
    unseen = [] if unseen is None else unseen
    return {name: _visible(run, name, unseen) for name in names & _FIELDS}


def _visible(run: CompletedRun, name: str, unseen: list[Unseen]) -> Any:  # noqa: ANN401 - whatever a field can hold
    value = getattr(run, name)
    match name:
        case "usage":
            return msgspec.to_builtins(value, enc_hook=str) | {"cost_usd": _double(value.cost_usd)}
        case "steps":
            if len(value) > VISIBLE_STEPS:
                unseen.append(((name,), f"{len(value) - VISIBLE_STEPS:,} of its {len(value):,} steps were not seen"))
            steps = enumerate(value[:VISIBLE_STEPS])
            return [_visible_step(step, (name, position), unseen) for position, step in steps]  # CEL has no tuples
        case _ if isinstance(value, str | int | dict | None):
            return _bounded(value, (name,), unseen)
        case _:
            return msgspec.to_builtins(value)


def _visible_step(step: Step, path: Path, unseen: list[Unseen]) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(step, enc_hook=str)
    made["cost_usd"] = _double(step.cost_usd)
    for name in STEP_TEXTS:
        if made[name] is not None and len(made[name]) > VISIBLE_MAX:
            made[name] = _bounded(made[name], (*path, name), unseen)
    return made


def _time(moment: datetime) -> datetime:
    try:
        return min(max(moment.astimezone(UTC), _EARLIEST), _LATEST)
    except OverflowError:
        # The offset leads out of the calendar.
        return _EARLIEST if moment.year == _EARLIEST.year else _LATEST


def _double(cost_usd: object) -> float | None:
    return None if cost_usd is None else float(str(cost_usd))


def _bounded(value: object, path: Path, unseen: list[Unseen]) -> object:
    if isinstance(value, str):
        if len(value) > VISIBLE_MAX:
            unseen.append((path, f"only the first {VISIBLE_MAX:,} characters of {path[0]} were seen"))
        return value[:VISIBLE_MAX]
    if isinstance(value, dict):
        return {key[:VISIBLE_MAX]: _bounded(item, (*path, key), unseen) for key, item in value.items()}
    if isinstance(value, list):
        return [_bounded(item, (*path, position), unseen) for position, item in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value


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
