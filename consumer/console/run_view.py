"""The data of a run's page: its timeline, its durations, and its steps end to end. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from consumer.phases import TransactionPhase
from consumer.runs.lookup import RunFile

# Units of a drawing, which is stretched to the page's width.
WIDTH = 1_000.0
# Units: the minimum width of a step.
_SLIVER = 3.0
# Steps shown initially; the others are one click away.
STEPS_IN_SIGHT = 40


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of the timeline: its time; a label if no row has the time; or not reached."""

    name: str
    at: datetime | None
    is_reached: bool
    text: str = ""
    is_other_day: bool = False


@dataclass(frozen=True, slots=True)
class Stretch:
    """A duration between two points, and its place in the drawing."""

    kind: str
    name: str
    seconds: float
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class StepBar:
    """A step and its place in the drawing."""

    step: dict[str, Any]
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Event:
    """One of the run's three events, with the time it was staged if it is unpublished."""

    type: str
    is_confirmed: bool
    waits_since: datetime | None


def marks(run: RunFile) -> list[Mark]:
    """Return the points of the timeline in order, including those not reached."""
    done = run.completion
    reached = dict(run.phases())
    day = done["started_at"].astimezone(UTC).date()

    def mark(name: str, at: datetime | None, *, is_reached: bool = True, text: str = "") -> Mark:
        return Mark(name, at, is_reached, text, at is not None and at.astimezone(UTC).date() != day)

    found = [mark("run started", done["started_at"]), mark("run ended", done["completed_at"])]
    for phase in (p for p in TransactionPhase if p not in {TransactionPhase.ROLLED_BACK, TransactionPhase.FAILED}):
        name, text = _NAMES[phase], ""
        if phase is TransactionPhase.INCIDENT_CREATED and run.prevention_record is not None:
            name = "prevention recorded"
        if phase is TransactionPhase.TRACE_COMPLETED:
            text = "in the same transaction" if run.trace is not None else "the run has no trace id"
        found.append(mark(name, reached.get(phase.value), is_reached=phase.value in reached, text=text))
    return found


_NAMES = {
    TransactionPhase.NOT_STARTED: "received",
    TransactionPhase.INCIDENT_CREATED: "incident created",
    TransactionPhase.POLICY_EVALUATED: "policies evaluated",
    TransactionPhase.TRACE_COMPLETED: "trace completed",
    TransactionPhase.COMMITTED: "committed",
    TransactionPhase.EVENTS_PUBLISHED: "events published",
}


def stretches(run: RunFile) -> list[Stretch]:
    """Return the durations between the run's end and its last event, by the clocks of three machines."""
    done = run.completion
    moments = [
        ("waited", "from its end to a worker", done["completed_at"], done["received_at"]),
        ("closed-out", "to the commit", done["received_at"], done["committed_at"]),
        ("published", "to the last confirm", done["committed_at"], done["events_published_at"]),
    ]
    lengths = [
        (kind, name, max(0.0, (end - start).total_seconds()))
        for kind, name, start, end in moments
        if start is not None and end is not None
    ]
    return [
        Stretch(kind, name, seconds, x, width)
        for (kind, name, seconds), (x, width) in zip(lengths, _placed([s for *_, s in lengths]), strict=True)
    ]


def step_bars(run: RunFile) -> list[StepBar]:
    """Return the trace's steps in order: where they belong in time if one has its start, otherwise end to end."""
    steps = sorted(run.trace["steps"] if run.trace else [], key=lambda step: step["index"])
    places = _in_time(steps) if has_times(steps) else _placed([_milliseconds(step) for step in steps])
    return [StepBar(step, x, width) for step, (x, width) in zip(steps, places, strict=True)]


def has_times(steps: Sequence[dict[str, Any]]) -> bool:
    """Return whether a step has the time of its start."""
    return any(step.get("started_at") for step in steps)


def _milliseconds(step: dict[str, Any]) -> float:
    return float(step.get("duration_ms") or 0)


def _in_time(steps: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return place and width of each step; one without its start begins where the step before it ended."""
    spans: list[tuple[float, float]] = []
    end = first = min(_started(step) for step in steps if step.get("started_at"))
    for step in steps:
        start = _started(step) if step.get("started_at") else end
        end = start + _milliseconds(step)
        spans.append((start, end))
    total = max(1.0, max(end for _, end in spans) - first)
    room = WIDTH - _SLIVER
    return [
        (round((start - first) / total * room, 1), round(max(_SLIVER, (end - start) / total * room), 1))
        for start, end in spans
    ]


def _started(step: dict[str, Any]) -> float:
    """Return the start of *step*, in milliseconds since 1970."""
    return datetime.fromisoformat(step["started_at"]).timestamp() * 1_000


def events(run: RunFile) -> list[Event]:
    """Return the run's events in publishing order; none before the last write."""
    if run.completion["committed_at"] is None:
        return []
    waiting = {event["type"]: event["created_at"] for event in run.outbox}
    finding = "incident.suppressed" if run.prevention_record else "incident.created"
    return [
        Event(kind, kind not in waiting, waiting.get(kind)) for kind in (finding, "policy.evaluated", "run.finalized")
    ]


def _placed(lengths: Sequence[float]) -> list[tuple[float, float]]:
    """Return place and width of each of *lengths*, end to end; short ones keep a visible width."""
    total = sum(lengths) or 1.0
    room = WIDTH - _SLIVER
    at, places = 0.0, []
    for length in lengths:
        places.append((round(min(at, 1.0) * room, 1), round(max(_SLIVER, length / total * room), 1)))
        at += length / total
    return places
