"""Adjustments: values of a message that were changed, truncated or dropped so that its run could be closed out."""

import json
from collections.abc import Iterator

from msgspec import Struct

from consumer.contract.refusals import Numeral

# Characters of a found value that are kept.
FOUND_CHARACTERS = 200
# Adjustments that are listed; one more entry counts the rest.
LISTED_MAX = 50


class Adjustment(Struct, frozen=True):
    """One changed value: the message's field, what was found there, and what is stored instead.

    ``found`` is at most 200 characters; below a field it begins with the place, such as ``[3].status: "odd"``.
    """

    field: str
    found: str
    stored: str | int | float | bool | None


class Adjustments:
    """Collects the adjustments of one message; a hostile message cannot make the list long."""

    def __init__(self) -> None:
        self._listed: list[Adjustment] = []
        self._more = 0
        self._last = ""

    def add(self, path: str, found: object, stored: object) -> None:
        """Record that *found* at *path*, such as ``steps[3].status``, is stored as *stored*."""
        field = _field_of(path)
        place = path[len(field) :]
        if len(self._listed) == LISTED_MAX:
            self._more, self._last = self._more + 1, field
            return
        text = _text_of(found)
        self._listed.append(Adjustment(field, _cut(_storable(f"{place}: {text}" if place else text)), _stored(stored)))

    def listed(self) -> tuple[Adjustment, ...]:
        """Return what was recorded, in the order of the message's fields."""
        if not self._more:
            return tuple(self._listed)
        return (*self._listed, Adjustment(self._last, f"{self._more} more values were adjusted", None))


def fields_of(adjustments: tuple[Adjustment, ...]) -> Iterator[str]:
    """Return the field of each adjustment, once."""
    return iter(dict.fromkeys(adjustment.field for adjustment in adjustments))


def _field_of(path: str) -> str:
    ends = [position for position in (path.find("."), path.find("[")) if position > 0]
    return path[: min(ends, default=len(path))]


def _text_of(found: object) -> str:
    """Return *found* as text that PostgreSQL can store: a string unchanged, anything else as JSON."""
    if isinstance(found, str):
        text = found[: FOUND_CHARACTERS + 1]
    elif isinstance(found, int) and not isinstance(found, bool) and found.bit_length() > 512:
        text = "an integer of hundreds of digits"
    else:
        # Only the beginning is kept, so only as much is encoded as that needs.
        pieces: list[str] = []
        length = 0
        for piece in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(found):
            pieces.append(piece)
            length += len(piece)
            if length > FOUND_CHARACTERS:
                break
        text = "".join(pieces)
    return text


def _storable(text: str) -> str:
    return text.replace("\x00", "\\u0000").encode("utf-8", "backslashreplace").decode()


def _cut(text: str) -> str:
    return text if len(text) <= FOUND_CHARACTERS else text[: FOUND_CHARACTERS - 1] + "…"


def _stored(value: object) -> str | int | float | bool | None:
    if value is None or (isinstance(value, bool | int | float) and not isinstance(value, Numeral)):
        return value
    return _cut(value if isinstance(value, str) else str(value))
