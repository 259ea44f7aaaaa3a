"""Upper bounds of the size of a value, from which the cost of a condition is estimated."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce


@dataclass(frozen=True, slots=True)
class Size:
    """Maximum number of elements (bytes of a text) as ``width``, and of nested ``values`` and ``content`` bytes.

    Repeated parts count repeatedly. ``part`` is no smaller than any element, key or value; ``fields`` are those of an
    object whose fields are all known, else null.
    """

    width: int
    values: int
    content: int
    part: "Size | None" = None
    fields: Mapping[str, "Size"] | None = None


def text(length: int) -> Size:
    """Return the size of a text of at most *length* bytes, or of a smaller value."""
    return Size(width=length, values=1, content=length)


# A number, a time or a boolean, and the text that string() returns for it.
SCALAR = text(64)


def of_list(width: int, part: Size) -> Size:
    """Return the size of a list, or of an object with unknown keys, of *width* elements no larger than *part*."""
    return Size(width=width, values=1 + width * part.values, content=width * part.content, part=part)


def of_object(fields: Mapping[str, Size]) -> Size:
    """Return the size of an object with *fields*."""
    key = text(max((4 * len(name) for name in fields), default=0))
    return Size(
        width=len(fields),
        values=1 + sum(size.values + 1 for size in fields.values()),
        content=sum(size.content + key.content for size in fields.values()),
        part=largest([key, *fields.values()]),
        fields=fields,
    )


def either(one: Size, other: Size) -> Size:
    """Return a size no smaller than *one* and no smaller than *other*."""
    if one == other:
        return one
    part = one.part and other.part and either(one.part, other.part)
    fields = None
    if one.fields is not None and other.fields is not None:
        names = {**one.fields, **other.fields}
        fields = {name: either(one.fields.get(name, SCALAR), other.fields.get(name, SCALAR)) for name in names}
    return Size(
        width=max(one.width, other.width),
        values=max(one.values, other.values),
        content=max(one.content, other.content),
        part=part or one.part or other.part,
        fields=fields,
    )


def largest(sizes: Iterable[Size]) -> Size:
    """Return a size no smaller than any of *sizes*."""
    return reduce(either, sizes, SCALAR)
