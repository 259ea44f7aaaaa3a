"""Conditions: CEL, compiled once, evaluated within bounds.

What bounds an evaluation: the library's budget of 10,000 loop iterations (a nested loop over 1,000 steps runs into it,
which is an evaluation error), regular expressions that are RE2's (linear) and small (``patterns.py``), the condition's
length, and the length of each string that a condition gets to see. The worst condition found so far takes 0.3 s,
four usual ones 17 us.
"""

import re
from typing import Any

import msgspec
from cel_expr_python import cel

from domains.policies.patterns import pattern_fault
from domains.run import CompletedRun

# Characters. A rule that needs more is a program.
CONDITION_MAX = 4_096
# Characters of each string of the run that conditions see: an error message may have a megabyte, and a condition may
# match it 10,000 times.
VISIBLE_MAX = 4_096

_INT64 = range(-(2**63), 2**63)
_POSITION = re.compile(r"ERROR: <input>:(?P<line>\d+):(?P<column>\d+): (?P<what>[^\n]*)")

_env = cel.NewEnv(variables={"run": cel.Type.Map(cel.Type.STRING, cel.Type.DYN)})


class ConditionError(ValueError):
    """A condition that does not compile. ``line`` and ``column`` count from 1, within the condition."""

    def __init__(self, what: str, *, line: int = 1, column: int = 1) -> None:
        super().__init__(f"line {line}, column {column}: {what}")
        self.line = line
        self.column = column


class EvaluationError(Exception):
    """A condition that could not be evaluated over one run; the text says why."""


class Visible:
    """A run as conditions see it, converted once for all of them."""

    __slots__ = ("activation",)

    def __init__(self, run: CompletedRun) -> None:
        self.activation = _env.Activation({"run": visible_fields(run)})


class Condition:
    """A compiled condition."""

    __slots__ = ("_expression", "text")

    def __init__(self, text: str) -> None:
        """Compile *text*; raise :class:`ConditionError` with the place where it is wrong."""
        if len(text) > CONDITION_MAX:
            raise ConditionError(f"{len(text)} characters; expected at most {CONDITION_MAX}")
        try:
            # Without the line end of a YAML block, so that an error at the end is on the last line.
            expression = _env.compile(text.rstrip())
        except TypeError:
            raise ConditionError("the text is not Unicode: it holds half of a surrogate pair") from None
        except RuntimeError as error:
            raise _condition_error(str(error)) from None
        fault = pattern_fault(text)
        if fault:
            what, offset = fault
            before = text[:offset]
            raise ConditionError(what, line=before.count("\n") + 1, column=offset - before.rfind("\n"))
        kind = expression.return_type().name()
        if kind not in {"BOOL", "DYN"}:
            raise ConditionError(f"the condition gives {kind.lower()}; expected true or false")
        self.text = text
        self._expression = expression

    def holds(self, run: Visible) -> bool:
        """Say whether the condition is true of *run*; raise :class:`EvaluationError` if it has no answer."""
        try:
            value = self._expression.eval(run.activation)
            kind, answer = value.type().name(), value.plain_value()
        except RuntimeError as error:  # how the library says that the iteration budget is used up
            raise EvaluationError(str(error).split(" [")[0]) from None
        if isinstance(answer, bool):
            return answer
        if kind == "ERROR":
            raise EvaluationError(str(answer))
        raise EvaluationError(f"the condition gave {kind.lower()}; expected true or false")


def visible_fields(run: CompletedRun) -> dict[str, Any]:
    """Return the message's fields as CEL can hold them, and ``duration_ms``.

    Times are RFC 3339 text (``timestamp(run.completed_at)`` makes a time of it), costs are doubles, strings are cut
    to ``VISIBLE_MAX`` characters, and whole numbers beyond 64 bits become doubles.
    """
    fields = msgspec.to_builtins(run, enc_hook=str)
    usage = fields["usage"]
    usage["cost_usd"] = _double(run.usage.cost_usd)
    for step, source in zip(fields["steps"], run.steps, strict=True):
        step["cost_usd"] = _double(source.cost_usd)
    fields["metadata"] = {_cut(key): _bounded(value) for key, value in fields["metadata"].items()}
    for name in ("error_message", "agent_id", "model", "synthetic_scenario_id"):
        fields[name] = _bounded(fields[name])
    for step in fields["steps"]:
        step["skill"] = _bounded(step["skill"])
    fields["steps"] = list(fields["steps"])  # CEL knows lists, not tuples
    fields["duration_ms"] = run.duration_ms
    return fields  # type: ignore[no-any-return]


def _double(cost: object) -> float | None:
    return None if cost is None else float(str(cost))


def _bounded(value: object) -> object:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value


def _cut(text: str) -> str:
    return text if len(text) <= VISIBLE_MAX else text[:VISIBLE_MAX]


def _condition_error(complaint: str) -> ConditionError:
    match = _POSITION.search(complaint)
    if match is None:
        return ConditionError(" ".join(complaint.split())[:300])
    return ConditionError(match["what"].strip()[:300], line=int(match["line"]), column=int(match["column"]))
