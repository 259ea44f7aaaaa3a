"""Any bytes in a message's properties can be read and written to a parked copy."""

import struct
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import decode
from pamqp.header import ContentHeader

from consumer.amqp.lenient_codec import UNREADABLE, read_leniently, writable
from consumer.parked.copies import _copied_properties

read_leniently()

# AMQP 0-9-1, basic's properties in the order of their flags, from the highest bit down.
ORDER = "ss ss table octet octet ss ss ss ss timestamp ss ss ss ss".replace("ss", "shortstr").split()


def shortstr(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def longstr(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def fixed(tag: bytes, size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size).map(lambda raw: tag + raw)


LEAVES = st.one_of(
    *(fixed(tag, 1) for tag in (b"t", b"b", b"B")),
    *(fixed(tag, 2) for tag in (b"s", b"u")),
    *(fixed(tag, 4) for tag in (b"I", b"i", b"f")),
    *(fixed(tag, 8) for tag in (b"l", b"L", b"d", b"T")),
    fixed(b"D", 5),
    st.just(b"V"),
    st.binary(max_size=40).map(lambda raw: b"S" + longstr(raw)),
    st.binary(max_size=40).map(lambda raw: b"x" + longstr(raw)),
    st.binary(min_size=1, max_size=3),  # an unknown tag, or a missing length
)
NAMES = st.binary(max_size=20) | st.sampled_from([b"x-closeout-attempts", b"CC", b"x-closeout-exchange"])


def table(entries: list[tuple[bytes, bytes]]) -> bytes:
    return longstr(b"".join(shortstr(name) + value for name, value in entries))


VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(st.tuples(NAMES, inner), max_size=4).map(lambda entries: b"F" + table(entries))
        | st.lists(inner, max_size=4).map(lambda items: b"A" + longstr(b"".join(items)))
    ),
    max_leaves=8,
)
FIELDS = {
    "shortstr": st.binary(max_size=255).map(shortstr),
    "table": st.lists(st.tuples(NAMES, VALUES), max_size=5).map(table),
    "octet": st.binary(min_size=1, max_size=1),
    "timestamp": st.binary(min_size=8, max_size=8) | st.integers(0, 2**34).map(lambda n: struct.pack(">Q", n)),
}


@st.composite
def content_headers(draw: Any) -> bytes:
    flags, parts = 0, b""
    for position, kind in enumerate(ORDER):
        if draw(st.booleans()):
            flags |= 1 << (15 - position)
            parts += draw(FIELDS[kind])
    return struct.pack(">HHQH", 60, 0, 0, flags) + parts


def read(raw: bytes) -> Any:
    header = ContentHeader()
    header.unmarshal(raw)
    return SimpleNamespace(header=header, exchange="runs", routing_key="run.completed", body=b"")


@settings(max_examples=500)
@given(content_headers())
def test_every_content_header_can_be_read_and_written_to_a_parked_copy(raw: bytes) -> None:
    ours: dict[str, str | int] = {"x-closeout-reason": "invalid_json", "x-closeout-attempts": 0}

    copy = _copied_properties(read(raw), ours, 131_064)

    again = read(struct.pack(">HHQ", 60, 0, 0) + copy.marshal()).header.properties
    assert again.headers.items() >= ours.items()
    assert (again.headers["x-closeout-exchange"], again.headers["x-closeout-routing-key"]) == ("runs", "run.completed")


@pytest.mark.parametrize("unit", [1, 1_000, 1_000_000, 1_000_000_000])
def test_timestamps_are_read_in_seconds_and_in_finer_units(unit: int) -> None:
    assert decode.METHODS["timestamp"](struct.pack(">Q", 1_800_000_000 * unit)) == (
        8,
        datetime(2027, 1, 15, 8, tzinfo=UTC),
    )


def test_unreadable_headers_are_kept_unmodified() -> None:
    raw = table([(b"\xe9", b"V")])
    assert decode.METHODS["table"](raw + b"the next property") == (len(raw), {UNREADABLE: bytearray(raw[4:])})


@pytest.mark.parametrize(
    ("read_as", "written_as"),
    [
        (b"\xff", bytearray(b"\xff")),
        ([b"\xff", {"deep": b""}], [bytearray(b"\xff"), {"deep": bytearray()}]),
        (0.5, 0.5),
        (0.1, "0.1"),
        (1e308, "1e+308"),
        (2**64, "18446744073709551616"),
        ("text", "text"),
        (None, None),
    ],
)
def test_values_that_cannot_be_encoded_become_text(read_as: object, written_as: object) -> None:
    assert writable(read_as) == written_as
