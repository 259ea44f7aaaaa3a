"""Explains why a condition holds on a run or not: the result of each clause, and the values it read."""

from typing import Any, Literal, NamedTuple

from msgspec import UNSET, Struct, UnsetType

from domains.policies.cel.clauses import Part, parts_of
from domains.policies.cel.conditions import Condition, ConditionError, EvaluationError
from domains.policies.cel.field_paths import MISSING, value_at, written
from domains.policies.cel.visible import Visible
from domains.policies.rules import error_text, holds

Answer = Literal["true", "false", "error", "unknown"]
State = Literal["known", "missing", "unknown"]


class Answered(NamedTuple):
    """A condition's result on one run, or why it has none."""

    answer: Answer
    error: str | None = None


class Explained(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A clause and its result; ``join`` states whether all or any of ``parts`` must be true."""

    text: str
    answer: Answer
    error: str | None = None
    join: Literal["any", "all"] | None = None
    parts: tuple["Explained", ...] = ()


class Value(Struct, frozen=True, kw_only=True):
    """The value at a path that a condition read; without ``value`` if it is missing or not stored."""

    path: str
    state: State = "known"
    value: Any | UnsetType = UNSET


def ask(condition: Condition | ConditionError, visible: Visible) -> Answered:
    """Return the result of *condition*; ``unknown`` if it depends on an unknown field of the run.

    Reading an omitted field is an error, and CEL's ``&&`` and ``||`` ignore an error on one side if the other side
    decides. A result without the field is therefore the result for any value of it.
    """
    depends_on = frozenset[str]()
    if visible.unknown and isinstance(condition, Condition):
        reads = condition.reads
        depends_on = reads.depends_on(visible.unknown)
        if depends_on and (reads.fields is None or depends_on & reads.tested):
            return Answered("unknown", _not_known(depends_on))
    try:
        return Answered("true" if holds(condition, visible) else "false")
    except EvaluationError as error:
        if depends_on:
            return Answered("unknown", _not_known(depends_on))
        return Answered("error", error_text(error))


def explain(condition: Condition, visible: Visible) -> Explained:
    """Return the results of *condition* and of its clauses; it is not split if a clause is not a valid condition."""
    part = parts_of(condition.text, condition.tree)
    try:
        return _explain(part, visible)
    except ConditionError:
        return _explain(Part(part.text), visible)


def values_read(condition: Condition, visible: Visible) -> list[Value]:
    """Return the values that *condition* read, in the form that conditions see."""
    values: list[Value] = []
    for path in condition.reads.paths:
        unknown = bool(path) and path[0] in visible.unknown
        value = MISSING if unknown else value_at(visible.fields, path)
        state: State = "unknown" if unknown else "missing" if value is MISSING else "known"
        values.append(Value(path=written(path), state=state, value=value))
    return values


def _explain(part: Part, visible: Visible) -> Explained:
    answer, error = ask(Condition(part.text), visible)
    return Explained(
        text=part.text,
        answer=answer,
        error=error,
        join=part.join,
        parts=tuple(_explain(inner, visible) for inner in part.parts),
    )


def _not_known(names: frozenset[str]) -> str:
    return f"not stored: {', '.join(sorted(names))}"
