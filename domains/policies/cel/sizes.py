"""Upper bounds of the size of a value and of a run, from which the cost of a condition is estimated."""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import le
from typing import Any, NamedTuple

from domains.run import VISIBLE_STEPS, CompletedRun, Step, Usage

# Bytes of a text that conditions see.
TEXT_MAX_BYTES = 16_384

# Text fields of any length.
_TEXTS = (
    "error_message", "agent_id", "model", "synthetic_scenario_id", "run_ref", "parent_run_id", "session_id",
)  # fmt: skip
STEP_TEXTS = ("skill", "kind", "model", "error_message")
# Levels of metadata.
_LEVELS = 16


class Size(NamedTuple):
    """Maximum number of ``content`` bytes, of nested ``values``, and of elements as ``width``.

    Repeated parts count repeatedly. ``part`` is no smaller than any element, key or value; ``fields`` are those of an
    object whose fields are all known, else null.
    """

    content: int
    values: int = 1
    width: int = 0
    part: "Size | None" = None
    fields: Mapping[str, "Size"] | None = None


# A number, a time or a boolean, and the text that string() returns for it.
SCALAR = Size(64)


def of_list(width: int, part: Size) -> Size:
    """Return the size of a list, or of an object with unknown keys, of *width* elements no larger than *part*."""
    return Size(width * part.content, 1 + width * part.values, width, part)


def of_items(items: Iterable[Size]) -> Size:
    """Return the size of a list of *items*, or of an object with these keys and values."""
    items = list(items)
    content, values = sum(item.content for item in items), sum(item.values for item in items)
    return Size(content, 1 + values, len(items), reduce(either, items, SCALAR))


def either(one: Size, other: Size) -> Size:
    """Return a size no smaller than *one* and no smaller than *other*."""
    if one == other:
        return one
    part = either(one.part, other.part) if one.part and other.part else one.part or other.part
    content, values = max(one.content, other.content), max(one.values, other.values)
    return Size(content, values, max(one.width, other.width), part)


def joined(one: Size, other: Size) -> Size:
    """Return the size of *one* and *other* added: texts, lists or numbers."""
    return either(one, other)._replace(
        content=one.content + other.content, values=one.values + other.values, width=one.width + other.width
    )


class Extent(NamedTuple):
    """The size of a run: steps, metadata keys and values, and bytes of its longest texts."""

    steps: int
    metadata: int
    message: int
    text: int

    @property
    def is_usual(self) -> bool:
        """Return whether every compiled condition is known to be cheap enough on such a run."""
        return all(map(le, self, USUAL))

    @property
    def run(self) -> Size:
        """The maximum size of such a run."""
        # Identities, codes and numbers have at most 128 ASCII characters.
        text, short = Size(max(128, self.text)), Size(128)
        names = (*CompletedRun.__struct_fields__, "duration_ms", "step_count")
        fields = dict.fromkeys(names, short) | dict.fromkeys(_TEXTS, text)
        step_texts = dict.fromkeys(STEP_TEXTS, text)
        fields |= {
            "error_message": Size(max(128, self.message)),
            "usage": _object(dict.fromkeys(Usage.__struct_fields__, short)),
            "steps": of_list(self.steps, _object(dict.fromkeys(Step.__struct_fields__, short) | step_texts)),
            "metadata": self._metadata(text),
        }
        return _object(fields)

    def _metadata(self, text: Size) -> Size:
        """Return the size of metadata, any value of which may be an object of all the others."""
        size = text
        for _ in range(_LEVELS):
            size = Size(self.metadata * text.content, 1 + self.metadata, self.metadata, size)
        return size


LARGEST = Extent(steps=VISIBLE_STEPS, metadata=1_000, message=TEXT_MAX_BYTES, text=TEXT_MAX_BYTES)
USUAL = Extent(steps=100, metadata=16, message=1_000, text=256)


def _object(fields: Mapping[str, Size]) -> Size:
    """Return the size of an object with *fields*, whose names are ASCII."""
    return of_items([*map(Size, map(len, fields)), *fields.values()])._replace(width=len(fields), fields=fields)


def extent_of(fields: dict[str, Any]) -> Extent:
    """Return the size of a run as conditions see it."""
    metadata, steps = fields["metadata"], fields["steps"]
    values = list(_values(metadata))
    texts = [*values, *(step[name] for step in steps for name in STEP_TEXTS), *(fields[name] for name in _TEXTS[1:])]
    longest = max(map(_bytes_of, texts))
    return Extent(len(steps), len(values), _bytes_of(fields["error_message"]), longest)


def _values(value: object) -> Iterator[object]:
    """Return every key, list item and value in *value*, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _values(item)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item)
    else:
        yield value


def _bytes_of(value: object) -> int:
    # An upper bound without encoding: UTF-8 has at most four bytes per character.
    return 0 if not isinstance(value, str) else len(value) if value.isascii() else 4 * len(value)
