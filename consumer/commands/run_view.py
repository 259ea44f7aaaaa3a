"""The report on one run: its timeline, what each domain recorded, and its events."""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from consumer.commands.output import out, print_line, printable
from consumer.phases import TransactionPhase
from consumer.runs.lookup import CHILDREN_AT_MOST, Row, RunFile
from consumer.runs.steps import details_of, name_of
from consumer.wording import counted
from domains.completions import EVENTS_PER_RUN

Line = tuple[str, str]
# Terminal columns from which steps are printed as a table.
_TABLE_WIDTH = 80
# Lines and characters of one text that are printed without --full.
_LINES = 12
_CHARACTERS = 2_000


def print_report(run: RunFile, *, full: bool = False) -> None:
    """Print all that is stored of *run*; 80 columns are enough. Without *full*, long texts are cut with a note."""
    done = run.completion
    name = done["run_ref"] or done["run_id"]
    out.print(Text(printable(f"Run {done['tenant_id']}/{name}"), style="bold"), soft_wrap=True)
    print_line(printable(_summary(run)))
    out.print()
    section = partial(_section, full=full)
    section("timeline (UTC)", _history(run))
    section("records", _records(run))
    if run.trace is not None and run.trace["steps"]:
        out.print(_steps(run.trace["steps"]) if out.width >= _TABLE_WIDTH else _steps_in_lines(run.trace["steps"]))
        out.print()
    section("events", _events(run))
    if done["adjustments"]:
        section("adjusted in the message", _adjustments(done["adjustments"]))
    section("the run", [(n.replace("_", " "), _plain(done[n])) for n in _FIELDS if done[n] not in _OMITTED])
    if run.children:
        most = f" (the first {CHILDREN_AT_MOST})" if len(run.children) == CHILDREN_AT_MOST else ""
        section(
            f"started by this run{most}", [(_plain(c["run_ref"] or c["run_id"]), c["status"]) for c in run.children]
        )


def _adjustments(adjustments: Iterable[Row]) -> Iterator[Line]:
    for one in adjustments:
        yield one["field"], f"found {one['found']}; stored {_plain(one['stored'])}"


_FIELDS = ("agent_id", "model", "cost_usd", "input_tokens", "cached_input_tokens", "output_tokens", "message_id",
           "parent_run_id", "session_id", "is_synthetic", "synthetic_scenario_id", "metadata")  # fmt: skip


# Values that are not printed.
_OMITTED: tuple[object, ...] = (None, False, {})


def format_time(at: datetime | None) -> str:
    """Return *at* in UTC, to the millisecond."""
    return "-" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3]


def _summary(run: RunFile) -> str:
    done = run.completion
    seconds = max(0.0, (done["completed_at"] - done["started_at"]).total_seconds())
    text = f"It {done['status']} after {seconds:g} s"
    text += f" with {done['error_code']}" if done["error_code"] else ""
    if run.incident is not None:
        text += f"; its incident is {run.incident['severity']} and {run.incident['status']}"
    elif run.prevention_record is not None:
        text += "; a policy suppressed its incident"
    text += f". Phase {done['phase']}: "
    if done["committed_at"] is None:
        return text + "the legacy close-out stopped after this write; it resumes when the message is delivered again."
    if run.outbox:
        return f"{text}{len(run.outbox)} of its {EVENTS_PER_RUN} events are not confirmed by RabbitMQ yet."
    return text + "everything is recorded, and its events are confirmed."


def _history(run: RunFile) -> list[Line]:
    done = run.completion
    ended = f"{done['status']}" + (f" with {done['error_code']}" if done["error_code"] else "")
    happened: list[tuple[datetime | None, str]] = [
        (done["started_at"], "run started (runner's clock)"),
        (done["completed_at"], f"run {ended} (runner's clock)"),
        (done["received_at"], "message delivered to a worker"),
        (done["committed_at"], _COMMITTED[done["mode"]]),
        (done["events_published_at"], "all events confirmed by RabbitMQ"),
    ]
    if done["mode"] == "legacy":
        for row, name, event in (
            (run.incident or run.prevention_record, "created_at", "first write: incident or prevention record"),
            (run.policy_evaluation, "evaluated_at", "second write: policy evaluation"),
        ):
            happened.append((row[name] if row else None, event))
    happened += [
        (r["occurred_at"], f"attempt {r['attempt']} rolled back at {r['phase_reached']}: {r['error_type']}: "
         f"{r['error']}" + (f" (undone: {', '.join(r['operations'])})" if r["operations"] else ""))
        for r in run.rollbacks
    ]  # fmt: skip
    # Rows of one transaction have the same time; the sort is stable.
    return [
        (format_time(at), event) for at, event in sorted(((a, w) for a, w in happened if a), key=lambda pair: pair[0])
    ]


_COMMITTED = {
    "atomic": "incident, evaluation, trace and events committed in one transaction",
    "legacy": "last separate write committed (legacy, not atomic)",
}


def _records(run: RunFile) -> Iterator[Line]:
    reached = list(TransactionPhase).index(TransactionPhase(run.completion["phase"]))
    if run.incident is not None:
        yield "incident", "{severity}, {category}, {status}: {title}".format(**run.incident)
        if run.incident["error_message"]:
            yield "", f"error message: {run.incident['error_message']}"
        yield "", f"id {run.incident['incident_id']}"
    elif run.prevention_record is not None:
        yield "no incident", _why_suppressed(run.suppressing_policy, run.prevention_record)
        yield "", f"prevention record {run.prevention_record['prevention_record_id']}"
    else:
        yield "incident", "none yet" if run.completion["committed_at"] is None else "MISSING: see closeout reconcile"
    yield from _evaluation(run.policy_evaluation)
    if run.trace is not None:
        yield "trace", f"{run.trace['status']}, {counted(len(run.trace['steps']), 'step')}, id {run.trace['trace_id']}"
    elif reached >= list(TransactionPhase).index(TransactionPhase.TRACE_COMPLETED):
        yield "trace", "none: the run has no trace id"
    else:
        yield "trace", "none yet"


def _why_suppressed(policy: Row | None, record: Row) -> str:
    if policy is None:
        return f"suppressed by policy {record['policy_id']}, which no longer exists"
    owner = f"tenant {policy['tenant_id']}" if policy["tenant_id"] else "all tenants"
    now = "enforced" if policy["enabled"] else "no longer enforced"
    condition = " ".join(policy["condition"].split())
    return (
        f"suppressed by policy {policy['name']} (version {policy['version']}, {owner}, {now}): "
        f"its condition was true: {condition}"
    )


def _evaluation(evaluation: Row | None) -> Iterator[Line]:
    if evaluation is None:
        yield "policies", "not evaluated yet"
        return
    yield "policies", f"{evaluation['policies_checked']} checked: {_OUTCOMES[evaluation['outcome']]}"
    for violated in evaluation["violations"]:
        yield "", "violated: {name} (version {version}), {severity}".format(**violated)
    for failed in evaluation["errors"]:
        yield "", "evaluation failed: {name} (version {version}): {error}".format(**failed)
    for shadowed in evaluation["shadow"] or ():
        yield "", "in shadow, without effect: {name} (version {version}), result {result}".format(**shadowed)
    yield "", f"id {evaluation['policy_evaluation_id']}"


_OUTCOMES = {
    "no_violation": "no violation",
    "violation": "violated",
    "evaluation_error": "some failed to evaluate",
}


def _events(run: RunFile) -> list[Line]:
    if run.completion["committed_at"] is None:
        return [("none yet", "events are published after the last write")]
    waiting = {event["type"]: event for event in run.outbox}
    finding = "incident.suppressed" if run.prevention_record else "incident.created"
    published = run.completion["events_published_at"]
    confirmed = f"confirmed by {format_time(published)}" if published else "confirmed"
    return [
        (kind, _pending(waiting[kind]) if kind in waiting else confirmed)
        for kind in (finding, "policy.evaluated", "run.finalized")
    ]


def _pending(event: Row) -> str:
    since = format_time(event["created_at"])
    return f"unpublished since {since}, routing key {event['routing_key']}, id {event['event_id']}"


def _steps(steps: Iterable[Row]) -> Table:
    step, ms, cost = (Column(name, justify="right", no_wrap=True) for name in ("step", "ms", "cost"))
    skill, error = Column("skill", overflow="fold"), Column("error", overflow="fold")
    status = Column("status", no_wrap=True)
    table = Table(step, skill, status, ms, cost, error, box=None, padding=(0, 2, 0, 2))
    for row in steps:
        values = (row["status"], row.get("duration_ms"), row.get("cost_usd"), _why(row))
        named = f"{_plain(name_of(row))}\n{printable(', '.join(details_of(row)))}".rstrip()
        table.add_row(str(row["index"]), Text(named), *(Text(_plain(value)) for value in values))
    return table


def _why(step: Row) -> str | None:
    return ": ".join(filter(None, (step.get("error_code"), step.get("error_message")))) or None


def _steps_in_lines(steps: Iterable[Row]) -> Table:
    table = Table(Column(justify="right", no_wrap=True), Column(overflow="fold"), box=None, show_header=False)
    for step in steps:
        parts = [f"{name_of(step) or '-'}: {step['status']}"]
        parts += [f"{step['duration_ms']} ms"] if step.get("duration_ms") is not None else []
        parts += [f"{step['cost_usd']} USD"] if step.get("cost_usd") is not None else []
        parts += [*details_of(step), *filter(None, [_why(step)])]
        table.add_row(f"  {step['index']}", Text(printable(", ".join(parts))))
    return table


def _section(title: str, lines: Iterable[Line], *, full: bool) -> None:
    out.print(Text(title, style="bold"))
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, text in lines:
        parts = text.split("\n") if full else _beginning_of(text)
        table.add_row(name, Text("\n".join(map(printable, parts))))
    out.print(table)
    out.print()


def _beginning_of(text: str) -> list[str]:
    """Return the first lines of *text*, with a note of what is cut."""
    lines = text[:_CHARACTERS].split("\n")
    if len(text) <= _CHARACTERS and len(lines) <= _LINES:
        return lines
    shown = lines[:_LINES]
    return [*shown, f"… cut: the first {sum(map(len, shown)):,} of {len(text):,} characters (--full prints all)"]


def _plain(value: Any) -> str:  # noqa: ANN401 - whatever a row or a step holds
    if isinstance(value, dict):
        return printable(json.dumps(value, ensure_ascii=False))
    return "-" if value is None else printable("yes" if value is True else str(value))
