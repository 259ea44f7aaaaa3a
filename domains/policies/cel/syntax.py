"""Reads a compiled condition's syntax tree from the library's serialized form.

The binding exposes only the serialized form of an expression: a protobuf ``CheckedExpr`` (cel-spec's checked.proto and
syntax.proto) inside an ``Any``. This module reads the few fields that the cost depends on. Macros are expanded, strings
unescaped, and calls have one form, so the notation of a condition hides nothing.
"""

from collections.abc import Callable
from typing import NamedTuple


class Literal(NamedTuple):
    """A constant; ``value`` is null unless it is a string or an integer, ``length`` the bytes of a text."""

    at: int
    value: str | int | None
    length: int


class Name(NamedTuple):
    """A variable: ``run``, one declared with a dot, or a loop's."""

    at: int
    name: str


class Select(NamedTuple):
    """``operand.field``, or ``has(operand.field)`` if it is a test."""

    at: int
    operand: "Node"
    field: str
    is_test: bool


class Call(NamedTuple):
    """A function or an operator; of ``text.matches(pattern)`` the text is the first argument.

    ``[a, b]`` is a call of ``[]``, and ``{key: value}`` one of ``{}``, or of the type if it is a protobuf message; its
    arguments are keys and values.
    """

    at: int
    function: str
    arguments: tuple["Node", ...]


class Loop(NamedTuple):
    """The macros all, exists, exists_one, filter and map over the elements of ``over``.

    Each element is tested with ``test``, which is null for a map without one; filter and map collect ``item``.
    """

    at: int
    variable: str
    over: "Node"
    test: "Node | None"
    item: "Node | None"


Node = Literal | Name | Select | Call | Loop
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
    for kind, make in _KINDS.items():
        if kind in fields:
            return make(_number(fields, 2), _fields(_bytes(fields, kind)))
    raise ValueError("an unknown kind of expression")


def _nodes(fields: _Fields, *numbers: int) -> tuple[Node, ...]:
    return tuple(_node(data) for number in numbers for data in fields.get(number, []))


def _literal(at: int, fields: _Fields) -> Literal:
    value: str | int | None = _text(fields, 6) if 6 in fields else None
    if 3 in fields:
        value = _number(fields, 3)
        value -= 2**64 * (value >= 2**63)
    return Literal(at, value, len(_bytes(fields, 6)) + len(_bytes(fields, 7)))


def _map(at: int, fields: _Fields) -> Call:
    # The field names of a message are omitted.
    nodes = [node for entry in fields.get(2, []) for node in _nodes(_fields(entry), 3, 4)]
    return Call(at, _text(fields, 1) or "{}", tuple(nodes))


def _loop(at: int, fields: _Fields) -> Loop:
    over, start, step = (_node(_bytes(fields, number)) for number in (2, 4, 6))
    test = item = None
    if isinstance(step, Call) and step.function == "_?_:_":
        test, step, _ = step.arguments
    match start, step:
        case Literal(), Call(function="_&&_" | "_||_", arguments=(Name(), body)):
            test = body
        case Literal(), Call(function="_+_", arguments=(Name(), Literal())):
            pass
        case Call(function="[]", arguments=()), Call(arguments=(Name(), Call(function="[]", arguments=(only,)))):
            item = only
        case _:
            raise ValueError("an unknown kind of loop")
    if 8 in fields:
        raise ValueError("a loop with two variables")
    return Loop(at, _text(fields, 1), over, test, item)


_KINDS: dict[int, Callable[[int, _Fields], Node]] = {
    3: _literal,
    4: lambda at, fields: Name(at, _text(fields, 1)),
    5: lambda at, fields: Select(at, _node(_bytes(fields, 1)), _text(fields, 2), bool(_number(fields, 3))),
    6: lambda at, fields: Call(at, _text(fields, 2), _nodes(fields, 1, 3)),
    7: lambda at, fields: Call(at, "[]", _nodes(fields, 1)),
    8: _map,
    9: _loop,
}


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


def _fields(data: int | bytes) -> _Fields:
    """Return the values of each field of a protobuf message, in order; numbers in wire form."""
    if isinstance(data, int):
        raise ValueError("a number in place of a message")  # noqa: TRY004 - the data is wrong, not the caller
    found: _Fields = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value: int | bytes
        if tag & 7 == 0:
            value, position = _varint(data, position)
        elif tag & 7 == 2:
            length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
        elif tag & 7 in _FIXED:
            length = _FIXED[tag & 7]
            value, position = data[position : position + length], position + length
        else:
            raise ValueError(f"wire type {tag & 7}")
        found.setdefault(tag >> 3, []).append(value)
    return found


# Bytes of the values of these wire types.
_FIXED = {1: 8, 5: 4}


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
