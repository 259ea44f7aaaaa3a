"""Refused messages: the reason, and an error text that names the field, what was found, and what is expected.

Only refused messages reach this code, so it may be slow, but it must never raise. Found values are truncated. The text
goes into the parked message's header, next to the body it quotes, and never into a log.
"""

import json
from typing import Literal

# Characters of a found value: enough to recognise it, short enough for a header.
_FOUND_CHARACTERS = 80

# Expected value of each required field.
EXPECTED = {
    "schema_version": "1",
    "tenant_id": "1 to 128 characters of A-Z a-z 0-9 . _ - : @ + ~ =",
    "run_id": "a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057, or 1 to 200 printable ASCII characters",
    "status": "one of succeeded, failed, halted, aborted",
    "started_at": "RFC 3339 with an offset such as 2026-11-01T12:00:00Z",
    "completed_at": "RFC 3339 with an offset such as 2026-11-01T12:00:00Z",
}


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
        return "the body is nested too deeply, and is not complete; expected one JSON object"
    try:
        body.decode()
    except UnicodeDecodeError as fault:
        return f"byte {fault.start} (0x{body[fault.start]:02x}) is not UTF-8; expected a JSON object in UTF-8"
    if not body.strip():
        return "the body is empty; expected one JSON object"
    detail = str(error).removeprefix("JSON is malformed: ")
    return f"not JSON: {detail}; expected one JSON object in UTF-8"


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
