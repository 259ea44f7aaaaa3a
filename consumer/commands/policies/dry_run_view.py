"""A trial of policies over one run, as a person reads it."""

from collections.abc import Iterator

import msgspec
from rich.text import Text

from consumer.commands.output import out
from consumer.policy_analysis.dry_run import Trial, Verdict
from domains.policies.explain import Explained, Value

# Characters of a value that are shown.
_SHOWN_MAX = 160
_INDENT = 15

_MARKS = {
    "holds": ("holds", "green"),
    "does_not_hold": ("does not hold", ""),
    "error": ("error", "red"),
    "unknown": ("unknown", "yellow"),
    "other_tenant": ("not asked", "dim"),
    "off": ("not asked", "dim"),
}
_NOT_ASKED = {"other_tenant": "of another tenant", "off": "off in the file (enabled: false)"}
_COLOURS = {"true": "green", "error": "red", "unknown": "yellow"}


def show(trial: Trial) -> None:
    """Print what each policy says of the run and why, then what would come of it."""
    with_code = f" with {trial.error_code}" if trial.error_code else ""
    _line(Text(f"Run {trial.tenant_id}/{trial.run_id} {trial.status}{with_code}", style="bold"))
    if trial.unknown:
        _line(Text(f"Not stored of this run, and so not known: {', '.join(trial.unknown)}", style="yellow"))
    for verdict in trial.policies:
        _line(Text())
        for line in _verdict(verdict):
            _line(line)
    _line(Text())
    _line(Text(f"Evaluation: {_outcome(trial)}"))
    _line(Text(f"Written: {_written(trial)}"))
    for name, result in trial.shadow.items():
        _line(Text(f"In shadow: {name} would be counted as {result}, and decides nothing"))


def _line(text: Text) -> None:
    out.print(text, soft_wrap=True)


def _verdict(verdict: Verdict) -> Iterator[Text]:
    mark, colour = _MARKS[verdict.result]
    owner = f"tenant {verdict.tenant_id}" if verdict.tenant_id else "all tenants"
    shadow = ", in shadow" if verdict.mode == "shadow" else ""
    about = f"{verdict.name} ({verdict.effect} {verdict.severity}, {owner}{shadow})"
    why_not = f": {_NOT_ASKED[verdict.result]}" if verdict.result in _NOT_ASKED else ""
    yield Text.assemble((f"{mark:<{_INDENT}}", colour), about, why_not)
    if verdict.parts is not None:
        yield from _part(verdict.parts, 0)
    for value in verdict.values:
        yield Text(" " * _INDENT + f"{value.path} {_shown(value)}", style="dim")


def _part(part: Explained, depth: int) -> Iterator[Text]:
    words = f"{part.join} of" if part.join else " ".join(part.text.split())
    why = f"  ({part.error})" if part.error and not part.join else ""
    style = _COLOURS.get(part.answer, "")
    yield Text.assemble(" " * (_INDENT + 2 * depth), (f"{part.answer:<9}", style), words, why)
    for inner in part.parts:
        yield from _part(inner, depth + 1)


def _shown(value: Value) -> str:
    if value.state != "known":
        return "is not there" if value.state == "missing" else "is not stored of this run"
    words = msgspec.json.encode(value.value).decode()
    size = f" ({len(value.value)} values)" if isinstance(value.value, list) else ""
    return f"= {words}" if len(words) <= _SHOWN_MAX else f"= {words[:_SHOWN_MAX]}…{size}"


def _outcome(trial: Trial) -> str:
    if trial.outcome is None:
        return "it depends on what is not stored of this run"
    said = [f"{trial.outcome}, {trial.policies_checked} checked"]
    if trial.violations:
        said.append(f"flagged by {', '.join(trial.violations)}")
    if trial.errors:
        said.append(f"failed to evaluate: {', '.join(trial.errors)}")
    return "; ".join(said)


def _written(trial: Trial) -> str:
    written = trial.writes
    if written is None:
        return "an incident or a prevention record, which depends on what is not stored of this run"
    if written.record == "incident":
        return f"an incident, {written.severity} {written.category}"
    return f"a prevention record in place of the incident, by {written.by}"
