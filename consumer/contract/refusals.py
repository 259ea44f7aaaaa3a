"""Refused messages: the reason, and an error text that names the field, what was found, and what is expected.

Only refused messages reach this code, so it may be slow, but it must never raise. Found values are truncated. The text
goes into the parked message's header, next to the body it quotes, and never into a log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isinf
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass

# Characters of a found value: enough to recognise it, short enough for a header.
_FOUND_CHARACTERS = 80

_EXPECTED = {
    "status": "one of succeeded, failed, halted, aborted",
    "steps[].status": "one of succeeded, failed, skipped",
    "tenant_id": "1 to 128 characters of A-Z a-z 0-9 . _ -",
    "run_id": "a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057",
    "trace_id": "a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057, or null",
    "error_code": "upper-case letters, digits and _, starting with a letter, at most 64, or null",
    "steps[].error_code": "upper-case letters, digits and _, starting with a letter, at most 64, or null",
    "started_at": "RFC 3339 with an offset such as 2026-11-01T12:00:00Z",
    "completed_at": "RFC 3339 with an offset such as 2026-11-01T12:00:00Z",
    "usage.cost_usd": "a decimal >= 0 or null",
    "steps[].cost_usd": "a decimal >= 0 or null",
    "metadata": "an object of at most 64 strings, numbers, booleans or nulls",
    "steps": "a list of at most 1000 steps",
    "steps[].index": "an integer from 0, unique in the run",
    "usage": "an object of cost_usd, input_tokens and output_tokens",
    "usage.input_tokens": "an integer from 0 to 9223372036854775807, or null",
    "usage.output_tokens": "an integer from 0 to 9223372036854775807, or null",
}
_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class Numeral(str):
    """A JSON number with a fraction or an exponent, as it was written."""

    __slots__ = ()


def describe_value(value: object) -> str:
    """Return a short description of any *value*, safe on one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print very large integers
        return "an integer of hundreds of digits"
    if isinstance(value, str) and not isinstance(value, Numeral):
        text = json.dumps(value[: _FOUND_CHARACTERS + 1])
    else:
        text = str(value)
    return text if len(text) <= _FOUND_CHARACTERS else text[:_FOUND_CHARACTERS] + "…"


def explain_malformed(body: bytes, error: Exception) -> str:
    """Return where and why *body* is not JSON, or not UTF-8."""
    if isinstance(error, RecursionError):
        return "the body is nested too deeply; expected one JSON object with at most a list of objects in it"
    try:
        body.decode()
    except UnicodeDecodeError as fault:
        return f"byte {fault.start} (0x{body[fault.start]:02x}) is not UTF-8; expected a JSON object in UTF-8"
    if not body.strip():
        return "the body is empty; expected one JSON object"
    if _LONE_SURROGATE.search(body) and "JSON is malformed" not in str(error):
        return (
            "a string holds half of a surrogate pair (\\ud800 to \\udfff alone), or ends early; expected Unicode text"
        )
    detail = str(error).removeprefix("JSON is malformed: ")
    return f"not JSON: {detail}; expected one JSON object in UTF-8"


def explain_violation(document: Mapping[str, Any], complaint: str) -> str:
    """Turn msgspec's *complaint* about *document* into the field, what was found, and what is expected."""
    match = _PATH.match(complaint)
    what, path = (match["what"], match["path"] or "") if match else (complaint, "")
    missing = _MISSING.search(what)
    if missing:
        path = f"{path}.{missing['name']}"
    trail, name = _locate(document, path)
    found = "missing" if missing else f"found {describe_value(trail)}"
    expected = _EXPECTED.get(re.sub(r"\[\d+\]", "[]", name)) or _expectation(what)
    return f"{name or 'the body'}: {found}; expected {expected}"


def _locate(document: object, path: str) -> tuple[object, str]:
    """Follow a path such as ``.steps[3].index``; ``[...]`` is the first key whose value is not a scalar."""
    value, name = document, ""
    for part in re.findall(r"\.[^.\[]+|\[\d+\]|\[\.\.\.\]", path):
        if part == "[...]":
            key, value = _odd_item(value)
            name += f".{key}"
        elif part.startswith("["):
            value = value[int(part[1:-1])] if isinstance(value, list) else None
            name += part
        else:
            value = value.get(part[1:]) if isinstance(value, dict) else None
            name += part
    return value, name.removeprefix(".")


def _odd_item(value: object) -> tuple[str, object]:
    """Return the first item that is not a metadata scalar; msgspec does not name it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(item, str | int | None) or _overflows(item):
                return describe_value(key), item
    return "?", value


def _overflows(value: str | int | None) -> bool:
    """Return whether *value* exceeds a double, which msgspec uses for fractions."""
    return isinstance(value, Numeral) and isinf(float(value))


def _expectation(what: str) -> str:
    if what == "Number out of range":
        return "a number that a double can hold"
    expected = what.removeprefix("Expected ").replace("`", "")
    return expected.split(", got ")[0] or "another value"


ParkReason = Literal[
    "invalid_json",
    "schema_violation",
    "unsupported_schema_version",
    "unsupported_content_type",
    "too_large",
    "untrusted_publisher",
    "conflicting_duplicate",
    "attempts_exhausted",
]
# Characters. The text becomes a header of the parked message; all its headers share one frame.
MAX_ERROR_CHARACTERS = 500


class MessageRefusedError(Exception):
    """The message can never be processed as it is; its sender must act. ``str()`` names what is wrong, and where."""

    def __init__(self, reason: ParkReason, error: str) -> None:
        super().__init__(error if len(error) <= MAX_ERROR_CHARACTERS else error[: MAX_ERROR_CHARACTERS - 1] + "…")
        self.reason: ParkReason = reason
