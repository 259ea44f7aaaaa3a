"""Estimates an upper bound of a condition's cost without evaluating it.

An evaluation cannot be interrupted and holds the interpreter's lock: one that takes a minute stops the worker for a
minute, and one that doubles a text thirty times takes all its memory. Each node of the tree is therefore charged for
the data it touches, as often as it may run: a loop's body once per element, within the library's iteration budget.
Branches that are not taken are charged too.
"""

import re
from collections.abc import Callable, Mapping

from domains.policies.cel import sizes
from domains.policies.cel.regex_cost import PATTERN_MAX, match_nanoseconds
from domains.policies.cel.sizes import SCALAR, Size
from domains.policies.cel.syntax import Call, Entries, ListOf, Literal, Loop, Name, Node, Select

# Loop iterations of one evaluation in total: the library's own, undocumented limit, which a test verifies.
ITERATIONS = 10_000

# Nanoseconds on a 2-core Debian 12 machine, rounded up: any node; an iteration; a comparison of two values; a list
# element copied for an append; a byte copied or decoded; a byte compared.
_NODE, _ITERATION, _VALUE, _COPIED, _BYTE, _COMPARED = 60, 150, 200, 150, 2, 0.5

# A time zone is read from a file of that name: a name with dots or a leading slash would open any file.
_ZONE = re.compile(r"[+-]?\d\d:\d\d|[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z][A-Za-z0-9_+-]*)*")

Names = Mapping[str, Size]


class CostFaultError(Exception):
    """A condition, or a part of it, without a bound on its cost; ``at`` is the node."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__(what)
        self.at = at


def nanoseconds(condition: Node, run: Size) -> int:
    """Return the nanoseconds of *condition* on a run no larger than *run*, at most; raise :class:`CostFaultError`."""
    estimate = _Estimate()
    estimate.of(condition, 1, {"run": run})
    return int(estimate.total)


class _Estimate:
    """Visits a tree, returns the maximum size of each node's value and adds up the cost of the nodes."""

    def __init__(self) -> None:
        self.total = 0.0

    def of(self, node: Node, times: int, names: Names) -> Size:
        """Charge *node* and all nodes below for running *times*, and return the size of its value."""
        self.total += times * _NODE
        match node:
            case Literal():
                return sizes.text(max(SCALAR.width, node.length))
            case Name():
                return names.get(node.name, SCALAR)
            case Select():
                return _field(self.of(node.operand, times, names), node.field)
            case Call():
                return self._call(node, times, names)
            case ListOf() | Entries():
                return self._collection(node, times, names)
            case Loop():
                return self._loop(node, times, names)

    def _collection(self, node: ListOf | Entries, times: int, names: Names) -> Size:
        if isinstance(node, Entries) and node.message:
            raise CostFaultError(f"{node.message} is a message; expected a plain value", node.at)
        items = [self.of(item, times, names) for item in node.items]
        self.total += times * _VALUE * len(items)
        return Size(
            width=len(items),
            values=1 + sum(item.values for item in items),
            content=sum(item.content for item in items),
            part=sizes.largest(items),
        )

    def _loop(self, node: Loop, times: int, names: Names) -> Size:
        over = self.of(node.over, times, names)
        rounds = min(over.width, ITERATIONS)
        inner = min(times * rounds, ITERATIONS)
        within = {**names, node.variable: over.part or SCALAR, node.result: SCALAR}
        self.total += inner * _ITERATION
        self.of(node.start, times, names)
        self.of(node.proceed, inner + times, within)
        collected = _collected(node)
        if collected is None:
            self.of(node.step, inner, within)
        else:
            condition, item = collected
            part = self.of(item, inner, within)
            if condition is not None:
                self.of(condition, inner, within)
            # The list is copied for each appended element.
            self.total += inner * (4 * _NODE + _COPIED * rounds / 2)
            within[node.result] = sizes.of_list(rounds, part)
        return self.of(node.outcome, times, within)

    def _call(self, node: Call, times: int, names: Names) -> Size:
        arguments = [self.of(argument, times, names) for argument in node.arguments]
        if node.function in _PLAIN:
            return SCALAR
        if node.function not in _FUNCTIONS:
            raise CostFaultError(f"{node.function}: not a function that conditions may use", node.at)
        if node.function == "matches":
            cost, size = float(match_nanoseconds(_pattern(node), arguments[0].content)), SCALAR
        else:
            cost, size = _FUNCTIONS[node.function](node, arguments)
        self.total += times * cost
        return size


def _collected(node: Loop) -> tuple[Node | None, Node] | None:
    """Return condition and item of a loop that builds a list, or ``None`` for other loops.

    Loops come only from macros. Any other loop, from a new version of the library, is refused.
    """
    match node.start, node.step:
        case Literal(), _:
            return None
        case ListOf(items=()), Call(function="_+_", arguments=(Name(), ListOf(items=(item,)))):
            return None, item
        case (
            ListOf(items=()),
            Call(
                function="_?_:_",
                arguments=(condition, Call(function="_+_", arguments=(Name(), ListOf(items=(item,)))), Name()),
            ),
        ):
            return condition, item
        case _:
            raise CostFaultError("an unknown kind of loop", node.at)


def _field(size: Size, name: str) -> Size:
    """Return the size of a field; a missing field is an error at evaluation."""
    return size.part or SCALAR if size.fields is None else size.fields.get(name, SCALAR)


def _pattern(node: Call) -> str:
    pattern = node.arguments[-1]
    if not isinstance(pattern, Literal) or pattern.text is None or len(node.arguments) != 2:
        raise CostFaultError("matches: expected a literal string as pattern", node.at)
    if len(pattern.text) > PATTERN_MAX:
        raise CostFaultError(
            f"matches: a pattern of {len(pattern.text)} characters; expected at most {PATTERN_MAX}", pattern.at
        )
    return pattern.text


def _added(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    one, other = arguments
    size = Size(
        width=one.width + other.width,
        values=one.values + other.values,
        content=one.content + other.content,
        part=(one.part or other.part) and sizes.either(one.part or SCALAR, other.part or SCALAR),
    )
    elements = sum(argument.width for argument in arguments if argument.part)
    return _COPIED * elements + _BYTE * size.content, size


def _compared(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    return _comparison(*arguments), SCALAR


def _comparison(one: Size, other: Size) -> float:
    # The comparison ends at the first difference.
    return _VALUE * min(one.values, other.values) + _COMPARED * min(one.content, other.content)


def _member(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    wanted, container = arguments
    return container.width * (_VALUE + _comparison(wanted, container.part or SCALAR)), SCALAR


def _indexed(node: Call, arguments: list[Size]) -> tuple[float, Size]:
    container, key = arguments
    given = node.arguments[1]
    if isinstance(given, Literal) and given.text is not None:
        return _VALUE, _field(container, given.text)
    return _VALUE + _COMPARED * key.content, container.part or SCALAR


def _chosen(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    return 0, sizes.either(arguments[1], arguments[2])


def _same(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    return 0, arguments[0]


def _counted(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    # The characters of a text are counted at each call; a list knows its length.
    return 0 if arguments[0].part else _BYTE * arguments[0].content, SCALAR


def _converted(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    content = arguments[0].content
    return 1_000 + 2 * _BYTE * content, sizes.text(max(SCALAR.width, content))


def _searched(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    # At each position all but the last character may match.
    searched, wanted = (argument.content for argument in arguments)
    return searched * (8 + wanted / 32), SCALAR


def _edge(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    return _COMPARED * min(argument.content for argument in arguments), SCALAR


def _calendar(node: Call, arguments: list[Size]) -> tuple[float, Size]:
    for zone in node.arguments[1:]:
        if not isinstance(zone, Literal) or zone.text is None or not _ZONE.fullmatch(zone.text):
            raise CostFaultError(f'{node.function}: expected a literal time zone such as "Europe/Berlin"', zone.at)
    return 2_000, arguments[0]


_PLAIN = frozenset({
    "_&&_", "_||_", "!_", "@not_strictly_false", "-_", "_-_", "_*_", "_/_", "_%_", "type",
})  # fmt: skip

_Charge = Callable[[Call, list[Size]], tuple[float, Size]]
_FUNCTIONS: dict[str, _Charge] = {
    "_+_": _added,
    "_?_:_": _chosen,
    "_[_]": _indexed,
    "@in": _member,
    "dyn": _same,
    "size": _counted,
    "matches": _same,
    "contains": _searched,
    **dict.fromkeys(("startsWith", "endsWith"), _edge),
    **dict.fromkeys(("_==_", "_!=_", "_<_", "_<=_", "_>_", "_>=_"), _compared),
    **dict.fromkeys(("string", "bytes", "int", "uint", "double", "bool", "timestamp", "duration"), _converted),
    **dict.fromkeys(
        ("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours",
         "getMinutes", "getSeconds", "getMilliseconds"),
        _calendar,
    ),
}  # fmt: skip
