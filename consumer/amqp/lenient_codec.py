"""Reads properties and headers that violate AMQP as far as possible, and makes them writable again.

RabbitMQ stores whatever a publisher sends, but pamqp fails the whole connection over a message id in Latin-1, a
timestamp in microseconds or deeply nested headers. The message and everything delivered with it would be redelivered
forever (``tests/integration/amqp/test_hostile_properties.py``).
"""

import struct
from datetime import UTC, datetime
from typing import Any

from pamqp import decode, encode

# Bytes of a short string (AMQP 0-9-1).
_SHORT_STRING_BYTES = 255
# The only header of an unreadable table: its raw bytes.
UNREADABLE = "x-closeout-unreadable-headers"
# Maximum nesting of headers that are written: pamqp uses two of Python's 1,000 frames per level.
_DEPTH_MAX = 50

_short_string = decode.METHODS["shortstr"]
_table = decode.METHODS["table"]


def read_leniently() -> None:
    """Make pamqp, in this process, read every property and header that RabbitMQ delivers. Safe to repeat."""
    # pamqp looks up decoders by type name and by tag in these two registries.
    decode.METHODS.update(shortstr=_read_short_string, timestamp=_read_timestamp, table=_read_table)
    decode.TABLE_MAPPING[b"T"] = _read_timestamp_header


def writable(value: object, depth: int = 0) -> Any:  # noqa: ANN401 - whatever a header can hold
    """Return *value*, read from a header, in a form that pamqp can write; an unwritable value becomes its text."""
    match value:
        case bytes():
            made: object = bytearray(value)
        case dict() | list() if depth > _DEPTH_MAX:
            made = "…"
        case dict():
            made = {name: writable(item, depth + 1) for name, item in value.items()}
        case list():
            made = [writable(item, depth + 1) for item in value]
        case _:
            made = value if _can_be_written(value) else str(value)
    return made


def _can_be_written(value: Any) -> bool:  # noqa: ANN401 - whatever a header can hold
    if isinstance(value, float) and not _is_single(value):
        return False
    try:
        encode.encode_table_value(value)
    except (TypeError, ValueError, struct.error):
        return False
    return True


def _is_single(value: float) -> bool:
    """Return whether *value* is unchanged by writing: pamqp writes single precision only."""
    try:
        return bool(struct.unpack(">f", struct.pack(">f", value))[0] == value)
    except OverflowError:
        return False


def _read_short_string(value: bytes) -> tuple[int, Any]:
    try:
        return _short_string(value)
    except UnicodeDecodeError:
        end = 1 + value[0]
        text = value[1:end].decode("utf-8", "backslashreplace")
        # Escapes may exceed the AMQP limit. The cut text stays UTF-8, because escapes are ASCII.
        return end, text.encode()[:_SHORT_STRING_BYTES].decode("utf-8", "ignore")


def _read_timestamp(value: bytes) -> tuple[int, Any]:
    """Read seconds, milli-, micro- or nanoseconds; ``None`` for a time outside the calendar."""
    (count,) = struct.unpack(">Q", value[:8])
    for unit in (1, 1_000, 1_000_000, 1_000_000_000):
        if count // unit <= 0xFFFF_FFFF:  # pamqp's maximum, in the year 2106
            return 8, datetime.fromtimestamp(count / unit, UTC)
    return 8, None


def _read_timestamp_header(value: bytes) -> tuple[int, Any]:
    length, time = _read_timestamp(value)
    return length, struct.unpack(">Q", value[:8])[0] if time is None else time


def _read_table(value: bytes) -> tuple[int, Any]:
    try:
        length, table = _table(value)
    except (ValueError, RecursionError, ArithmeticError, IndexError):
        length = 4 + struct.unpack(">I", value[:4])[0]
        return length, {UNREADABLE: bytearray(value[4:length])}
    return length, table
