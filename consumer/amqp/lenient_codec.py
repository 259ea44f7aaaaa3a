"""Properties and headers that are not what AMQP says: read as far as they go, and written again.

RabbitMQ stores whatever a publisher sends, and the client library gives up the whole connection over a message id in
Latin-1, a timestamp in microseconds or headers nested too deep. The message would come again on the next connection,
and so would all that were delivered with it, for ever. (``tests/integration/amqp/test_hostile_properties.py``)
"""

import struct
from datetime import UTC, datetime
from typing import Any

from pamqp import decode, encode

# Bytes of a short string, by AMQP 0-9-1.
_SHORT_STRING_BYTES = 255
# The one header of a table that could not be read: its bytes as they came.
UNREADABLE = "x-closeout-unreadable-headers"
# Tables within tables that are written. pamqp does it by recursion, two of Python's thousand frames each.
_DEPTH_MAX = 50

_short_string = decode.METHODS["shortstr"]
_table = decode.METHODS["table"]


def read_leniently() -> None:
    """Teach pamqp, in this process, to read every property and header that RabbitMQ passes on."""
    # The two registries are pamqp's own way from a type's name, or its tag, to what reads it.
    decode.METHODS.update(shortstr=_read_short_string, timestamp=_read_timestamp, table=_read_table)
    decode.TABLE_MAPPING[b"T"] = _read_timestamp_header


def writable(value: object, depth: int = 0) -> Any:  # noqa: ANN401 - whatever a header can hold
    """Return *value*, which was read from a header, as one that can be written; what cannot be becomes its text."""
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


def _can_be_written(value: Any) -> bool:  # noqa: ANN401 - as above
    if isinstance(value, float) and not _is_single(value):
        return False
    try:
        encode.encode_table_value(value)
    except (TypeError, ValueError, struct.error):
        return False
    return True


def _is_single(value: float) -> bool:
    """Say whether *value* survives being written: pamqp writes single precision only."""
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
        # Escaped it may be longer than AMQP lets it be; what is cut stays UTF-8, for an escape is ASCII.
        return end, text.encode()[:_SHORT_STRING_BYTES].decode("utf-8", "ignore")


def _read_timestamp(value: bytes) -> tuple[int, Any]:
    """Read seconds, and the finer units that clocks like to count in; ``None`` for what no calendar holds."""
    (count,) = struct.unpack(">Q", value[:8])
    for unit in (1, 1_000, 1_000_000, 1_000_000_000):
        if count // unit <= 0xFFFF_FFFF:  # the year 2106, as pamqp has it
            return 8, datetime.fromtimestamp(count / unit, UTC)
    return 8, None


def _read_timestamp_header(value: bytes) -> tuple[int, Any]:
    length, moment = _read_timestamp(value)
    return length, struct.unpack(">Q", value[:8])[0] if moment is None else moment


def _read_table(value: bytes) -> tuple[int, Any]:
    try:
        length, table = _table(value)
    except (ValueError, RecursionError, ArithmeticError, IndexError):
        length = 4 + struct.unpack(">I", value[:4])[0]
        return length, {UNREADABLE: bytearray(value[4:length])}
    return length, table
