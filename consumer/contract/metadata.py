"""Bounds the metadata of a run: nested values and lists, up to 1,000 values on 16 levels."""

from math import isinf
from typing import Any

from consumer.contract.adjustments import Adjustments
from consumer.contract.refusals import Numeral

VALUES_MAX = 1_000
LEVELS_MAX = 16


class _Full(Exception):  # noqa: N818 - a signal within this module
    pass


def is_plain(metadata: dict[str, Any]) -> bool:
    """Return whether *metadata* is within the bounds, as the strict decoder read it."""
    if len(metadata) <= VALUES_MAX and not any(isinstance(value, dict | list) for value in metadata.values()):
        return True
    try:
        return _count(metadata, 1) <= VALUES_MAX
    except _Full:
        return False


def _count(value: Any, level: int) -> int:  # noqa: ANN401 - any JSON
    if not isinstance(value, dict | list) or not value:
        if level > LEVELS_MAX and isinstance(value, dict | list):
            raise _Full
        return 1
    if level > LEVELS_MAX:
        raise _Full
    total = 0
    for item in value.values() if isinstance(value, dict) else value:
        total += _count(item, level + 1)
        if total > VALUES_MAX:
            raise _Full
    return total


class Bounded:
    """Copies metadata within the bounds. A value beyond them is dropped and recorded; the others stay."""

    def __init__(self, adjustments: Adjustments) -> None:
        self._adjustments = adjustments
        self._left = VALUES_MAX

    def copy(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return *metadata*, with NUL and half surrogate pairs replaced in its texts."""
        return {} if not metadata else self._copy(metadata, "metadata", 1)

    def _copy(self, value: dict[str, Any] | list[Any], path: str, level: int) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(value, dict):
            kept: dict[str, Any] = {}
            for key, item in value.items():
                place = f"{path}.{key[:100]}"
                name = self._text(key, place)
                if self._takes(item, place, level):
                    kept[name] = self._value(item, place, level)
            return kept
        items = [(item, f"{path}[{position}]") for position, item in enumerate(value)]
        return [self._value(item, place, level) for item, place in items if self._takes(item, place, level)]

    def _takes(self, item: object, path: str, level: int) -> bool:
        nested = isinstance(item, dict | list)
        fits = self._left > 0 and not (nested and level >= LEVELS_MAX) and not _is_too_large(item)
        if not fits:
            self._adjustments.add(path, item, None)
        elif not nested or not item:
            self._left -= 1
        return fits

    def _value(self, item: Any, path: str, level: int) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(item, dict | list):
            return self._copy(item, path, level + 1)
        if isinstance(item, Numeral):
            return float(item)
        return self._text(item, path) if isinstance(item, str) else item

    def _text(self, text: str, path: str) -> str:
        clean = clean_text(text)
        if clean != text:
            self._adjustments.add(path, text, clean)
        return clean


def _is_too_large(item: object) -> bool:
    """Return whether *item* is a fraction that no double can hold, or an integer that Python does not read."""
    return isinstance(item, Numeral) and isinf(float(item))


def clean_text(text: str) -> str:
    """Return *text* without NUL, which PostgreSQL cannot store, and with U+FFFD for each half of a surrogate pair."""
    if "\x00" in text:
        text = text.replace("\x00", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text
