"""The fields of a run that a condition reads: the paths in its syntax tree, and their values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from domains.policies.cel.syntax import Call, Literal, Loop, Name, Node, Select

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
    collector = _Collector()
    collector.read(tree, {"run": ()})
    paths = tuple(dict.fromkeys(collector.found))
    first = [path[0] if path else None for path in paths]
    names = frozenset(name for name in first if isinstance(name, str))
    return Reads(paths, names if len(names) == len(set(first)) else None, frozenset(collector.tested))


class _Collector:
    def __init__(self) -> None:
        self.found: list[Path] = []
        self.tested: set[str] = set()

    def read(self, node: Node | None, names: _Names) -> None:
        """Collect the longest paths below *node*; *names* maps variables to their paths."""
        match node:
            case Select() | Name() | Call() if (path := _path(node, names)) is not None:
                self.found.append(path)
                if isinstance(node, Select) and node.is_test and len(path) == 1:
                    self.tested.add(str(path[0]))
            case Select(operand=operand):
                self.read(operand, names)
            case Call(arguments=arguments):
                for argument in arguments:
                    self.read(argument, names)
            case Loop():
                self._loop(node, names)

    def _loop(self, node: Loop, names: _Names) -> None:
        over = _path(node.over, names)
        before = len(self.found)
        if over is None:
            self.read(node.over, names)
        within = {**names, node.variable: None if over is None else (*over, None)}
        self.read(node.test, within)
        # The element that filter() collects does not affect the result.
        if node.test is None or not isinstance(node.item, Name) or node.item.name != node.variable:
            self.read(node.item, within)
        # Otherwise a list that is only counted would not be listed.
        if over is not None and not any(path[: len(over)] == over for path in self.found[before:]):
            self.found.insert(before, over)


def _path(node: Node, names: _Names) -> Path | None:
    match node:
        case Name(name=name) if name.startswith("run.") and "run" in names:
            return (name.removeprefix("run."),)
        case Name(name=name):
            return names.get(name)
        case (
            Select(operand=container, field=str() | int() as key)
            | Call(function="_[_]", arguments=(container, Literal(value=str() | int() as key)))
        ):
            before = _path(container, names)
            return None if before is None else (*before, key)
        case _:
            return None


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
    text = "run"
    for key in path:
        if key is None:
            text += "[]"
        elif isinstance(key, str) and key.isidentifier():
            text += f".{key}"
        else:
            text += f"[{msgspec.json.encode(key).decode()}]"
    return text
