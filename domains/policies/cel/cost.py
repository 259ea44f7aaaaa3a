"""Estimates an upper bound of a condition's cost without evaluating it.

An evaluation cannot be interrupted and holds the interpreter's lock: one that takes a minute stops the worker for a
minute, and one that doubles a text thirty times takes all its memory. Each node of the tree is therefore charged for
the data it touches, as often as it may run: a loop's body once per element, within the library's iteration budget.
Branches that are not taken are charged too. A measured evaluation would not replace this: the run that makes a
condition expensive passes its guards, ``run.agent_id == "a" && ...``, and is not known when the policy is applied.
"""

import re
from collections.abc import Callable, Mapping

from domains.policies.cel import sizes
from domains.policies.cel.regex_cost import PATTERN_MAX, match_nanoseconds
from domains.policies.cel.sizes import SCALAR, Extent, Size
from domains.policies.cel.syntax import Call, Literal, Loop, Name, Node, Select

# Loop iterations of one evaluation in total: the library's own, undocumented limit, which a test verifies.
ITERATIONS = 10_000

# Nanoseconds on a 2-core Debian 12 machine, rounded up: any node; an iteration, with the nodes that a macro adds; a
# comparison of two values; a list element copied for an append; a byte copied or decoded; a byte compared.
_NODE, _ITERATION, _VALUE, _COPIED, _BYTE, _COMPARED = 60, 450, 200, 150, 2, 0.5

# A time zone is read from a file of that name: a name with dots or a leading slash would open any file.
_ZONE = re.compile(r"[+-]?\d\d:\d\d|[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z][A-Za-z0-9_+-]*)*")

_Names = Mapping[str, Size]


class CostFaultError(Exception):
    """A condition, or a part of it, without a bound on its cost; ``at`` is the node."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__(what)
        self.at = at


def milliseconds(condition: Node, extent: Extent) -> int:
    """Return the maximum milliseconds of *condition* on a run of *extent*; raise :class:`CostFaultError`."""
    estimate = _Estimate()
    estimate.of(condition, 1, {"run": extent.run})
    return int(estimate.nanoseconds) // 1_000_000


class _Estimate:
    """Visits a tree, returns the maximum size of each node's value and adds up the cost of the nodes."""

    def __init__(self) -> None:
        self.nanoseconds = 0.0

    def of(self, node: Node, times: int, names: _Names) -> Size:
        """Charge *node* and all nodes below for running *times*, and return the size of its value."""
        self.nanoseconds += times * _NODE
        match node:
            case Literal():
                return Size(max(SCALAR.content, node.length))
            case Name():
                return names.get(node.name, SCALAR)
            case (
                Select(operand=container, field=str(field))
                | Call(function="_[_]", arguments=(container, Literal(value=str(field))))
            ):
                return _field(self.of(container, times, names), field)
            case Call():
                return self._call(node, times, names)
            case Loop():
                return self._loop(node, times, names)

    def _loop(self, node: Loop, times: int, names: _Names) -> Size:
        over = self.of(node.over, times, names)
        rounds = min(over.width, ITERATIONS)
        inner = min(times * rounds, ITERATIONS)
        within = {**names, node.variable: over.part or SCALAR}
        self.nanoseconds += (inner + times) * _ITERATION
        if node.test is not None:
            self.of(node.test, inner, within)
        if node.item is None:
            return SCALAR
        # The list is copied for each appended element.
        self.nanoseconds += inner * _COPIED * rounds / 2
        return sizes.of_list(rounds, self.of(node.item, inner, within))

    def _call(self, node: Call, times: int, names: _Names) -> Size:
        arguments = [self.of(argument, times, names) for argument in node.arguments]
        if node.function not in _FUNCTIONS:
            raise CostFaultError(f"{node.function}: not a function or a type that conditions may use", node.at)
        if node.function == "matches":
            cost = float(match_nanoseconds(_pattern(node), arguments[0].content))
        else:
            if node.function in _CALENDAR:
                _check_zone(node)
            cost = _FUNCTIONS[node.function](*arguments)
        self.nanoseconds += times * cost
        return _RESULTS[node.function](*arguments) if node.function in _RESULTS else SCALAR


def _field(size: Size, name: str) -> Size:
    """Return the size of a field; a missing field is an error at evaluation."""
    return size.part or SCALAR if size.fields is None else size.fields.get(name, SCALAR)


def _pattern(node: Call) -> str:
    pattern = node.arguments[-1]
    if not isinstance(pattern, Literal) or not isinstance(pattern.value, str) or len(node.arguments) != 2:
        raise CostFaultError("matches: expected a literal string as pattern", node.at)
    if len(pattern.value) > PATTERN_MAX:
        raise CostFaultError(
            f"matches: a pattern of {len(pattern.value)} characters; expected at most {PATTERN_MAX}", pattern.at
        )
    return pattern.value


def _check_zone(node: Call) -> None:
    for zone in node.arguments[1:]:
        if not isinstance(zone, Literal) or not _ZONE.fullmatch(str(zone.value)):
            raise CostFaultError(f'{node.function}: expected a literal time zone such as "Europe/Berlin"', zone.at)


def _comparison(one: Size, other: Size) -> float:
    # The comparison ends at the first difference.
    return _VALUE * min(one.values, other.values) + _COMPARED * min(one.content, other.content)


_CALENDAR = (
    "getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours", "getMinutes",
    "getSeconds", "getMilliseconds",
)  # fmt: skip
_CONVERSIONS = ("string", "bytes", "int", "uint", "double", "bool", "timestamp", "duration")
_FREE = ("_&&_", "_||_", "!_", "-_", "_-_", "_*_", "_/_", "_%_", "_?_:_", "dyn", "matches", "type")

# Estimates for each function that conditions may use, from the sizes of its arguments: nanoseconds, and the size of its
# result.
_FUNCTIONS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(_FREE, lambda *_: 0),
    **dict.fromkeys(_CALENDAR, lambda *_: 2_000),
    **dict.fromkeys(_CONVERSIONS, lambda value: 1_000 + 2 * _BYTE * value.content),
    **dict.fromkeys(("_==_", "_!=_", "_<_", "_<=_", "_>_", "_>=_"), _comparison),
    **dict.fromkeys(("startsWith", "endsWith"), lambda one, other: _COMPARED * min(one.content, other.content)),
    **dict.fromkeys(("[]", "{}"), lambda *items: _VALUE * len(items)),
    "_+_": lambda one, other: _COPIED * (one.width + other.width) + _BYTE * (one.content + other.content),
    "_[_]": lambda _, key: _VALUE + _COMPARED * key.content,
    "@in": lambda wanted, among: among.width * (_VALUE + _comparison(wanted, among.part or SCALAR)),
    # At each position all but the last character may match.
    "contains": lambda text, wanted: text.content * (8 + wanted.content / 32),
    # The characters of a text are counted at each call; a list knows its length.
    "size": lambda value: 0 if value.part else _BYTE * value.content,
}
_RESULTS: dict[str, Callable[..., Size]] = {
    **dict.fromkeys(_CONVERSIONS, lambda value: Size(max(SCALAR.content, value.content))),
    **dict.fromkeys(("[]", "{}"), lambda *items: sizes.of_items(items)),
    "_+_": sizes.joined,
    "_?_:_": lambda _, one, other: sizes.either(one, other),
    "_[_]": lambda container, _: container.part or SCALAR,
    "dyn": lambda value: value,
}
