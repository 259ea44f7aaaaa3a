"""Policy files: YAML or JSON, checked whole, every fault named with its line."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from msgspec import Struct

from domains.policies.conditions import Condition, ConditionError
from domains.policies.rules import Effect, Severity

# Bytes. A thousand policies fit ten times over.
FILE_MAX = 4_194_304

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}\Z")
_FIELDS = ("name", "tenant_id", "effect", "severity", "condition", "enabled")


class PolicyDraft(Struct, frozen=True, kw_only=True):
    """A policy as a file asks for it."""

    name: str
    tenant_id: str | None
    effect: Effect
    severity: Severity
    condition: str
    enabled: bool = True


class PolicyFileError(ValueError):
    """The file is not a list of policies; the text has one line a fault."""


class _Loader(yaml.SafeLoader):
    """Safe, and without aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - yaml's own
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # yaml has no types here
            raise yaml.MarkedYAMLError(problem="aliases are not taken; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


def read_policies(text: str, *, source: str) -> list[PolicyDraft]:
    """Return the policies in *text*: a list, or an object with a list ``policies``; JSON is YAML too.

    Raises :class:`PolicyFileError` with all faults, each as ``source:line: field: what was found; what is expected``.
    """
    if len(text.encode("utf-8", "replace")) > FILE_MAX:
        raise PolicyFileError(f"{source}: larger than {FILE_MAX} bytes")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise PolicyFileError(_yaml_fault(source, error)) from None
    items = _items(node)
    if items is None:
        raise PolicyFileError(f"{source}:1: expected a list of policies, or an object with a list named policies")
    drafts: list[PolicyDraft] = []
    faults: list[str] = []
    seen: dict[tuple[str | None, str], int] = {}
    for item in items:
        line = item.start_mark.line + 1
        found = list(_faults(item, source))
        faults += found
        if found or not isinstance(item, yaml.MappingNode):
            continue
        draft = PolicyDraft(**_values(item))
        first = seen.setdefault((draft.tenant_id, draft.name), line)
        if first != line:
            faults.append(f"{source}:{line}: name: {draft.name!r} again, as in line {first}; expected one of each name")
        drafts.append(draft)
    if faults:
        raise PolicyFileError("\n".join(faults))
    return drafts


def _items(node: yaml.Node | None) -> list[yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        lists = [value for key, value in node.value if key.value == "policies"]
        node = lists[0] if lists else None
    return node.value if isinstance(node, yaml.SequenceNode) else None


def _values(item: yaml.MappingNode) -> dict[str, Any]:
    values = yaml.SafeLoader("").construct_mapping(item, deep=True)
    return {"tenant_id": None, **{str(name): value for name, value in values.items()}}


def _faults(item: yaml.Node, source: str) -> Iterator[str]:
    line = item.start_mark.line + 1
    if not isinstance(item, yaml.MappingNode):
        yield f"{source}:{line}: expected a policy with {', '.join(_FIELDS)}"
        return
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in item.value}
    try:
        values = _values(item)
    except yaml.YAMLError as error:
        yield _yaml_fault(source, error)
        return
    for name in sorted(set(map(str, values)) - set(_FIELDS)):
        yield f"{source}:{lines.get(name, line)}: {name}: not a field of a policy; expected {', '.join(_FIELDS)}"
    for name in ("name", "effect", "severity", "condition"):
        if name not in values:
            yield f"{source}:{line}: {name}: missing; expected {_EXPECTED[name]}"
    for name, value in values.items():
        if name in _EXPECTED and not _is_right(name, value):
            yield f"{source}:{lines[name]}: {name}: found {value!r:.80}; expected {_EXPECTED[name]}"
    condition = values.get("condition")
    if isinstance(condition, str) and condition:
        try:
            Condition(condition)
        except ConditionError as error:
            at = _condition_line(item) + error.line - 1
            yield f"{source}:{at}: condition: {error}"


_EXPECTED = {
    "name": "1 to 128 letters, digits, spaces and . _ -",
    "tenant_id": "a tenant's id, or null for all tenants",
    "effect": " or ".join(get_args(Effect)),
    "severity": "one of " + ", ".join(get_args(Severity)),
    "condition": "a CEL expression over run, in quotes or a block",
    "enabled": "true or false",
}


def _is_right(name: str, value: object) -> bool:
    match name:
        case "name":
            return isinstance(value, str) and bool(_NAME.match(value))
        case "tenant_id":
            return value is None or (isinstance(value, str) and bool(_TENANT.match(value)))
        case "effect":
            return value in get_args(Effect)
        case "severity":
            return value in get_args(Severity)
        case "condition":
            return isinstance(value, str) and bool(value.strip()) and "\x00" not in value
        case _:
            return isinstance(value, bool)


def _condition_line(item: yaml.MappingNode) -> int:
    """Return the line in the file on which the condition's first line stands."""
    for key, value in item.value:
        if key.value == "condition":
            # The text of a block (| or >) begins below its marker.
            return int(value.start_mark.line) + (2 if value.style in {"|", ">"} else 1)
    return int(item.start_mark.line) + 1


def _yaml_fault(source: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{source}:{mark.line + 1 if mark else 1}: {problem}"
