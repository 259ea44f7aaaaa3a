"""What evaluating a condition over a run may cost, reckoned from above without evaluating it.

An evaluation cannot be interrupted and holds the interpreter's lock, so one that takes a minute stops the worker for a
minute, and one that doubles a text thirty times takes all its memory. Each node of the tree is therefore charged for
what it touches, as often as it may run: a loop's body for each element, and no more often than the library's budget of
iterations allows. Branches that are never taken are charged too.
"""

import re
from collections.abc import Callable, Mapping

from domains.policies.cel import sizes
from domains.policies.cel.regex_cost import PATTERN_MAX, match_nanoseconds
from domains.policies.cel.sizes import SCALAR, Size
from domains.policies.cel.syntax import Call, Entries, ListOf, Literal, Loop, Name, Node, Select

# Loop iterations of one evaluation, nested and one after the other together: the library's own limit, which it does
# not document and a test holds it to.
ITERATIONS = 10_000

# Nanoseconds on the machine of ``shared/design.md``, rounded up: any node; an iteration; one value compared with
# another; a list's element copied when something is appended to it; a byte copied or decoded; a byte compared.
_NODE, _ITERATION, _VALUE, _COPIED, _BYTE, _COMPARED = 60, 150, 200, 150, 2, 0.5

# A zone is read from a file of that name, so that a name with dots or a leading slash would open any file.
_ZONE = re.compile(r"[+-]?\d\d:\d\d|[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z][A-Za-z0-9_+-]*)*")

Names = Mapping[str, Size]


class CostFaultError(Exception):
    """A condition whose cost has no bound, or a part of it that would go without one; ``at`` is the node."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__(what)
        self.at = at


def nanoseconds(condition: Node, run: Size) -> int:
    """Return what *condition* takes at most over a run no larger than *run*; raise :class:`CostFaultError`."""
    reckoning = _Reckoning()
    reckoning.of(condition, 1, {"run": run})
    return int(reckoning.total)


class _Reckoning:
    """Walks a tree: returns how large each node's value may be, and adds up what the nodes cost."""

    def __init__(self) -> None:
        self.total = 0.0

    def of(self, node: Node, times: int, names: Names) -> Size:
        """Charge *node* and all below it for running *times*, and return the size of its value."""
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
            # The list so far is copied for each element that is appended.
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
    """Return what a loop that builds a list does for each element (its condition, the item), or None for the others.

    Loops come from macros only, so what is neither of these does not occur; if a new version of the library brings it,
    it is refused.
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
            raise CostFaultError("a loop of a kind that is not known", node.at)


def _field(size: Size, name: str) -> Size:
    """Return the size of a field; one that an object does not have is an error at evaluation."""
    return size.part or SCALAR if size.fields is None else size.fields.get(name, SCALAR)


def _pattern(node: Call) -> str:
    pattern = node.arguments[-1]
    if not isinstance(pattern, Literal) or pattern.text is None or len(node.arguments) != 2:
        raise CostFaultError("matches: expected a pattern written out as one string", node.at)
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
    # The larger is not looked at beyond the first difference.
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
    # The characters of a text are counted anew each time, a list knows its length.
    return 0 if arguments[0].part else _BYTE * arguments[0].content, SCALAR


def _converted(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    content = arguments[0].content
    return 1_000 + 2 * _BYTE * content, sizes.text(max(SCALAR.width, content))


def _searched(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    # At each place all but the end of the wanted text may fit.
    searched, wanted = (argument.content for argument in arguments)
    return searched * (8 + wanted / 32), SCALAR


def _edge(_: Call, arguments: list[Size]) -> tuple[float, Size]:
    return _COMPARED * min(argument.content for argument in arguments), SCALAR


def _calendar(node: Call, arguments: list[Size]) -> tuple[float, Size]:
    for zone in node.arguments[1:]:
        if not isinstance(zone, Literal) or zone.text is None or not _ZONE.fullmatch(zone.text):
            raise CostFaultError(f'{node.function}: expected a time zone written out, as in "Europe/Berlin"', zone.at)
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
