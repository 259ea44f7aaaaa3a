"""The fields of a run that a condition reads: the paths in its syntax tree, and their values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from domains.policies.cel.syntax import Call, Entries, ListOf, Literal, Loop, Name, Node, Select

# From ``run`` on: a field's name, an element's number, or null for each element of a list, or key of an object.
Path = tuple[str | int | None, ...]
_Names = Mapping[str, Path | None]

# The value of a path that the run does not have.
MISSING = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Reads:
    """The paths that a condition reads. ``fields`` are the run's fields among them; null: all of them.

    ``tested`` are those whose presence it tests: ``has(run.steps)``.
    """

    paths: tuple[Path, ...]
    fields: frozenset[str] | None
    tested: frozenset[str]

    def depends_on(self, names: frozenset[str]) -> frozenset[str]:
        """Return the fields in *names* that occur in the condition."""
        return names if self.fields is None else names & self.fields


def reads_of(tree: Node) -> Reads:
    """Return the paths that the condition *tree* reads, each once, in the order of the text."""
    walk = _Walk()
    walk.into(tree, {"run": ()})
    paths = tuple(dict.fromkeys(walk.found))
    first = [path[0] if path else None for path in paths]
    names = frozenset(name for name in first if isinstance(name, str))
    return Reads(paths, names if len(names) == len(set(first)) else None, frozenset(walk.tested))


class _Walk:
    def __init__(self) -> None:
        self.found: list[Path] = []
        self.tested: set[str] = set()

    def into(self, node: Node, names: _Names) -> None:
        """Collect the longest paths below *node*; *names* maps variables to their paths."""
        path = self._path(node, names)
        if path is not None:
            self.found.append(path)
            if isinstance(node, Select) and node.is_test and len(path) == 1:
                self.tested.add(str(path[0]))
        elif isinstance(node, Loop):
            self._loop(node, names)
        else:
            for below in _below(node):
                self.into(below, names)

    def _path(self, node: Node, names: _Names) -> Path | None:
        match node:
            case Name(name=name) if name.startswith("run.") and "run" in names:
                return (name.removeprefix("run."),)
            case Name(name=name):
                return names.get(name)
            case Select(operand=operand, field=field):
                before = self._path(operand, names)
                return None if before is None else (*before, field)
            case Call(function="_[_]", arguments=(container, Literal(value=str() | int() as key))):
                before = self._path(container, names)
                return None if before is None else (*before, key)
            case _:
                return None

    def _loop(self, node: Loop, names: _Names) -> None:
        over = self._path(node.over, names)
        before = len(self.found)
        within = {**names, node.variable: None if over is None else (*over, None), node.result: None}
        if over is None:
            self.into(node.over, names)
        for below in (node.start, node.proceed, node.step, node.outcome):
            self.into(_without_collecting(below, node.variable), within)
        # Otherwise a list that is only counted would not be listed.
        if over is not None and not any(path[: len(over)] == over for path in self.found[before:]):
            self.found.insert(before, over)


def _without_collecting(step: Node, variable: str) -> Node:
    """Return a loop's *step* without the element that filter() collects, which does not affect the result."""
    match step:
        case Call(
            function="_?_:_", arguments=(condition, Call(function="_+_", arguments=(_, ListOf(items=(item,)))), _)
        ):
            return condition if isinstance(item, Name) and item.name == variable else step
        case _:
            return step


def _below(node: Node) -> Iterator[Node]:
    match node:
        case Select(operand=operand):
            yield operand
        case Call(arguments=nodes) | ListOf(items=nodes) | Entries(items=nodes):
            yield from nodes
        case _:
            return


def overlap(one: Path, other: Path) -> bool:
    """Return whether one of two paths leads to the other, or to the same value; null in a path is any key."""
    return all(a == b or a is None or b is None for a, b in zip(one, other, strict=False))


def value_at(fields: Mapping[str, Any], path: Path) -> Any:  # noqa: ANN401 - whatever a run holds
    """Return the value at *path* in a run's *fields*, or :data:`MISSING`."""
    value: Any = fields
    for position, key in enumerate(path):
        if key is None:
            rest = path[position + 1 :]
            elements = value if isinstance(value, list | dict) else ()
            found = (value_at({"": element}, ("", *rest)) for element in elements)
            return [None if one is MISSING else one for one in found]
        has_it = key in value if isinstance(value, dict) else _is_index(key, value)
        if not has_it:
            return MISSING
        value = value[key]
    return value


def _is_index(key: str | int, value: object) -> bool:
    return isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value)


def written(path: Path) -> str:
    """Return *path* as written in a condition; ``[]`` means each element."""
    words = "run"
    for key in path:
        if key is None:
            words += "[]"
        elif isinstance(key, str) and key.isidentifier():
            words += f".{key}"
        else:
            words += f"[{msgspec.json.encode(key).decode()}]"
    return words
