"""Reads a compiled condition's syntax tree from the library's serialized form.

The binding exposes only the serialized form of an expression: a protobuf ``CheckedExpr`` (cel-spec's checked.proto and
syntax.proto) inside an ``Any``. This module reads the few fields that the cost depends on. Macros are expanded, strings
unescaped, and calls have one form, so the notation of a condition hides nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant; ``text`` is null unless it is a string, ``length`` its bytes, ``value`` a string or integer."""

    at: int
    text: str | None
    length: int
    value: str | int | None = None


@dataclass(frozen=True, slots=True)
class Name:
    """A variable: ``run``, one declared with a dot, or a loop's."""

    at: int
    name: str


@dataclass(frozen=True, slots=True)
class Select:
    """``operand.field``, or ``has(operand.field)`` if it is a test."""

    at: int
    operand: "Node"
    field: str
    is_test: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A function or an operator; of ``text.matches(pattern)`` the text is the first argument."""

    at: int
    function: str
    arguments: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class ListOf:
    """``[a, b]``."""

    at: int
    items: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Entries:
    """``{a: b}``; ``message`` is the type's name if it is a protobuf message. Keys that are names are omitted."""

    at: int
    message: str
    items: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """The expansion of all, exists, exists_one, filter and map."""

    at: int
    variable: str
    over: "Node"
    result: str
    start: "Node"
    proceed: "Node"
    step: "Node"
    outcome: "Node"


Node = Literal | Name | Select | Call | ListOf | Entries | Loop
_Fields = dict[int, list[int | bytes]]


def read(serialized: bytes) -> Node:
    """Return the tree; raise ``ValueError`` if the bytes have an unknown form."""
    return _node(_bytes(_checked(serialized), 4))


def offset_of(serialized: bytes, at: int) -> int:
    """Return the offset in the condition, in characters, of the node *at*; 0 if it has none."""
    for entry in _fields(_bytes(_checked(serialized), 5)).get(4, []):
        place = _fields(entry)
        if _number(place, 1) == at:
            return _number(place, 2)
    return 0


def _checked(serialized: bytes) -> _Fields:
    return _fields(_bytes(_fields(serialized), 2))


def _node(data: int | bytes) -> Node:
    fields = _fields(data)
    at = _number(fields, 2)
    for kind, make in _KINDS.items():
        if kind in fields:
            return make(at, _fields(_bytes(fields, kind)))
    raise ValueError("an unknown kind of expression")


def _literal(at: int, fields: _Fields) -> Literal:
    text = _bytes(fields, 6).decode() if 6 in fields else None
    length = len(_bytes(fields, 6)) + len(_bytes(fields, 7))
    return Literal(at, text, length, _signed(fields, 3) if 3 in fields else text)


def _name(at: int, fields: _Fields) -> Name:
    return Name(at, _text(fields, 1))


def _select(at: int, fields: _Fields) -> Select:
    return Select(at, _node(_bytes(fields, 1)), _text(fields, 2), bool(_number(fields, 3)))


def _call(at: int, fields: _Fields) -> Call:
    arguments = fields.get(1, []) + fields.get(3, [])
    return Call(at, _text(fields, 2), tuple(map(_node, arguments)))


def _list(at: int, fields: _Fields) -> ListOf:
    return ListOf(at, tuple(map(_node, fields.get(1, []))))


def _entries(at: int, fields: _Fields) -> Entries:
    entries = map(_fields, fields.get(2, []))
    return Entries(at, _text(fields, 1), tuple(_node(item) for entry in entries for item in _key_and_value(entry)))


def _key_and_value(entry: _Fields) -> Iterator[int | bytes]:
    yield from entry.get(3, [])
    yield from entry.get(4, [])


def _loop(at: int, fields: _Fields) -> Loop:
    if 8 in fields:
        raise ValueError("a loop with two variables")
    over, start, proceed, step, outcome = (_node(_bytes(fields, number)) for number in (2, 4, 5, 6, 7))
    return Loop(at, _text(fields, 1), over, _text(fields, 3), start, proceed, step, outcome)


_KINDS: dict[int, Callable[[int, _Fields], Node]] = {
    3: _literal, 4: _name, 5: _select, 6: _call, 7: _list, 8: _entries, 9: _loop,
}  # fmt: skip


def _bytes(fields: _Fields, number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    if isinstance(value, int):
        raise ValueError(f"field {number} is a number")  # noqa: TRY004 - the data is wrong, not the caller
    return value


def _text(fields: _Fields, number: int) -> str:
    return _bytes(fields, number).decode()


def _number(fields: _Fields, number: int) -> int:
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is not a number")  # noqa: TRY004 - the data is wrong, not the caller
    return value


def _signed(fields: _Fields, number: int) -> int:
    value = _number(fields, number)
    return value - 2**64 if value >= 2**63 else value


def _fields(data: int | bytes) -> _Fields:
    """Return the values of each field of a protobuf message, in order; numbers in wire form."""
    if isinstance(data, int):
        raise ValueError("a number in place of a message")  # noqa: TRY004 - the data is wrong, not the caller
    found: _Fields = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value: int | bytes
        match tag & 7:
            case 0:
                value, position = _varint(data, position)
            case 2:
                length, position = _varint(data, position)
                value, position = data[position : position + length], position + length
            case 1:
                value, position = data[position : position + 8], position + 8
            case 5:
                value, position = data[position : position + 4], position + 4
            case other:
                raise ValueError(f"wire type {other}")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("the message ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
