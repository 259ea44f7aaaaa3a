"""Reads from the row of a stored run what decides a condition's result, without building the run."""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

from consumer.runs.stored import Columns, StoredRow, decoded_metadata
from domains.policies.cel.conditions import Condition
from domains.policies.cel.field_paths import MISSING, Path, value_at
from domains.policies.cel.projection import projection
from domains.run import VISIBLE_STEPS

# The key of a row; raises NoKeyError.
RowKey = Callable[[StoredRow], Hashable]
# Remembered texts of metadata, and characters of one.
_TEXTS_MAX, _TEXT_MAX = 1_000, 2_000
_SCALARS = (str, int, float, type(None))


class NoKeyError(Exception):
    """The condition reads more of the run than plain values."""


def row_key(condition: Condition, columns: Columns) -> RowKey | None:
    """Return the function that makes *condition*'s key of a row, or ``None`` if there is none.

    Rows with one key have the same result.
    """
    wanted = projection(condition)
    if wanted is None or not columns.positions.keys() >= set(wanted.fields):
        return None
    parts: list[RowKey] = []
    if wanted.fields:
        fields = itemgetter(*(columns.positions[name] for name in wanted.fields))
        if not wanted.of_steps and not wanted.in_metadata:
            return fields
        parts.append(fields)
    if wanted.of_steps:
        parts.append(_steps_key(wanted.of_steps, columns))
    if wanted.in_metadata:
        parts.append(_metadata_key(wanted.in_metadata, columns))
    return lambda row: tuple([part(row) for part in parts])


def _steps_key(names: Sequence[str], columns: Columns) -> RowKey:
    values = attrgetter(*names)
    # To Python 1 and 1.0 are one key; to a condition they are two.
    typed = "duration_ms" in names

    def key(row: StoredRow) -> Hashable:
        steps = columns.steps_of(row)
        if steps is None:
            return None
        if len(steps) > VISIBLE_STEPS:
            raise NoKeyError
        found = tuple(map(values, steps))
        return (found, tuple([type(step.duration_ms) for step in steps])) if typed else found

    return key


def _metadata_key(paths: Sequence[Path], columns: Columns) -> RowKey:
    def values(text: str) -> Hashable:
        return _plain_values(decoded_metadata(text), paths)

    remembered = lru_cache(_TEXTS_MAX)(values)  # runs of one agent often have the same metadata

    def key(row: StoredRow) -> Hashable:
        text = row[columns.metadata_at]
        return remembered(text) if len(text) <= _TEXT_MAX else values(text)

    return key


def _plain_values(metadata: dict[str, Any], paths: Sequence[Path]) -> Hashable:
    found = [value_at(metadata, path) for path in paths]
    if any(value is not MISSING and not isinstance(value, _SCALARS) for value in found):
        raise NoKeyError
    return tuple([(type(value), value) for value in found])
