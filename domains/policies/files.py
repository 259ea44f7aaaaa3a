"""Reads policy files, YAML or JSON, and reports every fault with its line."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, get_args

import yaml
from msgspec import Struct

from domains.policies.cel.conditions import Condition, ConditionError
from domains.policies.rules import Effect, Mode, Severity
from domains.run import TENANT_PATTERN

# Bytes: ten times the size of a thousand policies.
FILE_MAX = 4_194_304

# Characters of a found value in an error.
_VALUE_MAX = 80

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}")
_TENANT = re.compile(TENANT_PATTERN)
_CONDITION = re.compile(r"[^\0]*[^\s\0][^\0]*")
# For each field, the description of its valid values and the check.
_EXPECTED: dict[str, tuple[str, Callable[[object], object]]] = {
    "name": (
        "1 to 128 letters, digits, spaces and . _ -",
        lambda value: isinstance(value, str) and _NAME.fullmatch(value),
    ),
    "tenant_id": (
        "a tenant's id, or null for all tenants",
        lambda value: value is None or (isinstance(value, str) and _TENANT.fullmatch(value)),
    ),
    "effect": (" or ".join(get_args(Effect)), get_args(Effect).__contains__),
    "severity": ("one of " + ", ".join(get_args(Severity)), get_args(Severity).__contains__),
    "condition": (
        "a CEL expression on run, in quotes or a block",
        lambda value: isinstance(value, str) and _CONDITION.fullmatch(value),
    ),
    "mode": (" or ".join(get_args(Mode)), get_args(Mode).__contains__),
    "enabled": ("true or false", lambda value: isinstance(value, bool)),
}
_FIELDS = ", ".join(_EXPECTED)


class PolicyDraft(Struct, frozen=True, kw_only=True):
    """A policy in a file."""

    name: str
    tenant_id: str | None
    effect: Effect
    severity: Severity
    condition: str
    mode: Mode = "enforce"
    enabled: bool = True


class PolicyFileError(ValueError):
    """The file is not a valid list of policies; the text has one line per fault."""


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases: a few lines of aliases can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - yaml's own
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # yaml has no types here
            raise yaml.MarkedYAMLError(problem="aliases are not allowed; repeat the value", problem_mark=mark)
        return super().compose_node(parent, index)


class _Invalid(NamedTuple):
    """A value that is not a string, boolean or null, as written: a number, a date, a list."""

    text: str


def read_policies(text: str, *, source: str) -> list[PolicyDraft]:
    """Return the policies in *text*: a list, or an object with a list ``policies``, in YAML or JSON.

    Raises :class:`PolicyFileError` with all faults, each as ``source:line: field: what was found; what is expected``.
    """
    if len(text.encode("utf-8", "replace")) > FILE_MAX:
        raise PolicyFileError(f"{source}: larger than {FILE_MAX} bytes")
    items = _items(_compose(text, source))
    if items is None:
        raise PolicyFileError(f"{source}:1: expected a list of policies, or an object with a list named policies")
    drafts: list[PolicyDraft] = []
    faults: list[str] = []
    seen: dict[tuple[object, object], int] = {}
    for item in items:
        line = item.start_mark.line + 1
        found = list(_faults(item, source))
        if not found:
            draft = PolicyDraft(**{"tenant_id": None, **{name: value for name, (_, value) in _fields(item).items()}})
            if (draft.tenant_id, draft.name) in seen:
                first = seen[draft.tenant_id, draft.name]
                found = [f"{source}:{line}: name: {draft.name!r} is already in line {first}; expected unique names"]
            seen.setdefault((draft.tenant_id, draft.name), line)
            drafts.append(draft)
        faults += found
    if faults:
        raise PolicyFileError("\n".join(faults))
    return drafts


def _compose(text: str, source: str) -> yaml.Node | None:
    """Parse *text* into nodes with line numbers. JSON is YAML except for tabs between values."""
    with suppress(ValueError, RecursionError):
        json.loads(text)
        text = text.replace("\t", " ")
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        raise PolicyFileError(f"{source}:{mark.line + 1 if mark else 1}: {problem or 'not text'}"[:500]) from None
    except (RecursionError, ValueError, UnicodeError):
        raise PolicyFileError(f"{source}:1: nested too deeply, or not text; expected a list of policies") from None


def _items(node: yaml.Node | None) -> list[yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        lists = [value for key, value in node.value if key.value == "policies"]
        node = lists[0] if lists else None
    return node.value if isinstance(node, yaml.SequenceNode) else None


def _fields(item: yaml.Node) -> dict[str, tuple[yaml.Node, Any]]:
    """Return each field's node and value; the value of a duplicate field is ``_Invalid``."""
    fields: dict[str, tuple[yaml.Node, Any]] = {}
    for key, node in item.value:
        name = str(key.value)[:_VALUE_MAX]
        fields[name] = (node, _Invalid("a duplicate field") if name in fields else _value(node))
    return fields


def _value(node: yaml.Node) -> Any:  # noqa: ANN401 - what a file may hold
    kind = node.tag.rpartition(":")[2]
    if not isinstance(node, yaml.ScalarNode):
        return _Invalid("a list" if isinstance(node, yaml.SequenceNode) else "an object")
    if kind == "null":
        return None
    if kind == "bool" and node.value.lower() in {"true", "false"}:
        return node.value.lower() == "true"
    if kind != "str":
        return _Invalid(str(node.value)[:_VALUE_MAX])
    try:
        # JSON may write a character beyond 16 bits as two escapes, which YAML reads as two characters.
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeError:
        return _Invalid("half of a surrogate pair")


def _faults(item: yaml.Node, source: str) -> Iterator[str]:
    line = item.start_mark.line + 1
    if not isinstance(item, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in item.value):
        yield f"{source}:{line}: expected a policy with {_FIELDS}"
        return
    fields = _fields(item)
    for name in sorted(set(fields) - set(_EXPECTED)):
        at = next(key.start_mark.line + 1 for key, _ in item.value if str(key.value).startswith(name))
        yield f"{source}:{at}: {name}: not a field of a policy; expected {_FIELDS}"
    for name in ("name", "effect", "severity", "condition"):
        if name not in fields:
            yield f"{source}:{line}: {name}: missing; expected {_EXPECTED[name][0]}"
    for name, (node, value) in fields.items():
        at = node.start_mark.line + 1
        expected, accepts = _EXPECTED.get(name, ("", bool))
        if expected and not accepts(value):
            yield f"{source}:{at}: {name}: found {_found(value)}; expected {expected}"
        elif name == "condition":
            try:
                Condition(value)
            except ConditionError as error:
                # The text of a block (| or >) starts on the line below its marker.
                below = int(getattr(node, "style", None) in {"|", ">"})
                yield f"{source}:{at + below + error.line - 1}: condition: {error}"


def _found(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return value.text if isinstance(value, _Invalid) else repr(value)[:_VALUE_MAX]
