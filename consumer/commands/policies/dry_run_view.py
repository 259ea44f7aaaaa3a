"""Formats a dry run of policies on one run."""

from collections.abc import Iterator

import msgspec
from rich.text import Text

from consumer.commands.output import out
from consumer.policy_analysis.dry_run import DryRun, Verdict
from domains.policies.explain import Explained, Value

# Characters of a value that are printed.
_VALUE_MAX = 160
_INDENT = 15

_MARKS = {
    "holds": ("holds", "green"),
    "does_not_hold": ("does not hold", ""),
    "error": ("error", "red"),
    "unknown": ("unknown", "yellow"),
    "other_tenant": ("skipped", "dim"),
    "off": ("skipped", "dim"),
}
_SKIPPED = {"other_tenant": "of another tenant", "off": "off in the file (enabled: false)"}
_COLOURS = {"true": "green", "error": "red", "unknown": "yellow"}


def print_dry_run(result: DryRun) -> None:
    """Print the result of each policy and why, then what would be written."""
    with_code = f" with {result.error_code}" if result.error_code else ""
    _line(Text(f"Run {result.tenant_id}/{result.run_id} {result.status}{with_code}", style="bold"))
    if result.unknown:
        _line(Text(f"Not stored, treated as unknown: {', '.join(result.unknown)}", style="yellow"))
    for verdict in result.policies:
        _line(Text())
        for line in _verdict(verdict):
            _line(line)
    _line(Text())
    _line(Text(f"Evaluation: {_outcome(result)}"))
    _line(Text(f"Written: {_written(result)}"))
    for name, shadowed in result.shadow.items():
        _line(Text(f"In shadow: {name}, result {shadowed}, without effect"))


def _line(text: Text) -> None:
    out.print(text, soft_wrap=True)


def _verdict(verdict: Verdict) -> Iterator[Text]:
    mark, colour = _MARKS[verdict.result]
    owner = f"tenant {verdict.tenant_id}" if verdict.tenant_id else "all tenants"
    shadow = ", in shadow" if verdict.mode == "shadow" else ""
    about = f"{verdict.name} ({verdict.effect} {verdict.severity}, {owner}{shadow})"
    why_not = f": {_SKIPPED[verdict.result]}" if verdict.result in _SKIPPED else ""
    yield Text.assemble((f"{mark:<{_INDENT}}", colour), about, why_not)
    if verdict.parts is not None:
        yield from _part(verdict.parts, 0)
    for value in verdict.values:
        yield Text(" " * _INDENT + f"{value.path} {_format_value(value)}", style="dim")


def _part(part: Explained, depth: int) -> Iterator[Text]:
    text = f"{part.join} of" if part.join else " ".join(part.text.split())
    why = f"  ({part.error})" if part.error and not part.join else ""
    style = _COLOURS.get(part.answer, "")
    yield Text.assemble(" " * (_INDENT + 2 * depth), (f"{part.answer:<9}", style), text, why)
    for inner in part.parts:
        yield from _part(inner, depth + 1)


def _format_value(value: Value) -> str:
    if value.state != "known":
        return "is missing" if value.state == "missing" else "is not stored"
    text = msgspec.json.encode(value.value).decode()
    size = f" ({len(value.value)} values)" if isinstance(value.value, list) else ""
    return f"= {text}" if len(text) <= _VALUE_MAX else f"= {text[:_VALUE_MAX]}…{size}"


def _outcome(result: DryRun) -> str:
    if result.outcome is None:
        return "depends on data that is not stored"
    parts = [f"{result.outcome}, {result.policies_checked} checked"]
    if result.violations:
        parts.append(f"flagged by {', '.join(result.violations)}")
    if result.errors:
        parts.append(f"failed to evaluate: {', '.join(result.errors)}")
    return "; ".join(parts)


def _written(result: DryRun) -> str:
    written = result.writes
    if written is None:
        return "an incident or a prevention record, depending on data that is not stored"
    if written.record == "incident":
        return f"an incident, {written.severity} {written.category}"
    return f"a prevention record in place of the incident, by {written.by}"
