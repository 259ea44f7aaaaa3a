"""Why a condition holds over a run, or does not: the answer of each of its parts, and the values it read."""

from typing import Any, Literal, NamedTuple

from msgspec import UNSET, Struct, UnsetType

from domains.policies.cel.clauses import Part, parts_of
from domains.policies.cel.conditions import Condition, ConditionError, EvaluationError, Visible
from domains.policies.cel.field_paths import MISSING, value_at, written
from domains.policies.rules import error_in_words, holds

Answer = Literal["true", "false", "error", "unknown"]


class Answered(NamedTuple):
    """A condition's answer over one run, and why it has none."""

    answer: Answer
    error: str | None = None


class Explained(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a condition and its answer; ``join`` says whether all or any of ``parts`` must be true."""

    text: str
    answer: Answer
    error: str | None = None
    join: Literal["any", "all"] | None = None
    parts: tuple["Explained", ...] = ()


class Value(Struct, frozen=True, kw_only=True):
    """What stood where a condition looked; without ``value`` where the run has nothing there, or it is not known."""

    path: str
    state: Literal["known", "missing", "unknown"] = "known"
    value: Any | UnsetType = UNSET


def ask(condition: Condition | ConditionError, visible: Visible) -> Answered:
    """Return the answer of *condition*, ``unknown`` if it depends on a field of the run that is not known.

    A field that is left out is an error where it is read, and CEL's ``&&`` and ``||`` get over an error on one side
    if the other decides. So an answer that comes all the same would be this one whatever the field held.
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
        return Answered("error", error_in_words(error))


def explain(condition: Condition, visible: Visible) -> Explained:
    """Return the answers of *condition* and of each of its parts; it stays whole if a part is no condition alone."""
    part = parts_of(condition.text, condition.tree)
    try:
        return _explain(part, visible)
    except ConditionError:
        return _explain(Part(part.text), visible)


def values_read(condition: Condition, visible: Visible) -> list[Value]:
    """Return what *condition* found where it looked, as conditions see it: texts cut, costs as doubles."""
    values: list[Value] = []
    for path in condition.reads.paths:
        if path and path[0] in visible.unknown:
            values.append(Value(path=written(path), state="unknown"))
            continue
        value = value_at(visible.fields, path)
        if value is MISSING:
            values.append(Value(path=written(path), state="missing"))
        else:
            values.append(Value(path=written(path), value=value))
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
