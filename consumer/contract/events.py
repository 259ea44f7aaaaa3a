"""The events of a closed-out run; pure functions.

An event is a CloudEvent 1.0 in structured JSON. It is built once, inside the transaction, and stored as the text that
is published; publishing again sends the same text under the same id. The trace context of the run's message is included
as CloudEvents' distributed tracing extension, so that any publisher finds it there.
"""

from datetime import datetime
from typing import Annotated, Literal, TypedDict
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from uuid_utils.compat import uuid7

from consumer.contract.trace_context import TRACEPARENT_PATTERN, TRACESTATE_CHARACTERS_MAX, TraceContext
from domains.incidents.rules import Finding, Incident, severity_of
from domains.policies.rules import Evaluation, Violation
from domains.run import CompletedRun, RunKey

SOURCE = "/closeout"
CONTENT_TYPE = "application/cloudevents+json"

EventType = Literal["incident.created", "incident.suppressed", "policy.evaluated", "run.finalized"]


class About(Struct, frozen=True, kw_only=True):
    """The run that the event is about."""

    tenant_id: str
    run_id: UUID
    run_ref: str | UnsetType = UNSET
    agent_id: str | None
    is_synthetic: bool


class IncidentCreated(About, frozen=True, kw_only=True):
    """An incident was recorded; every run gets one, success included."""

    incident_id: UUID
    outcome: str
    severity: str
    category: str
    error_code: str | None


class IncidentSuppressed(About, frozen=True, kw_only=True):
    """A policy suppressed the incident; a prevention record was written instead."""

    prevention_record_id: UUID
    policy_id: UUID
    error_code: str | None


class PolicyEvaluated(About, frozen=True, kw_only=True):
    """The policies were evaluated on the run."""

    policy_evaluation_id: UUID
    outcome: str
    policies_checked: int
    violations: tuple[Violation, ...]


class RunFinalized(About, frozen=True, kw_only=True):
    """The run is closed out; the last event of a run."""

    status: str
    incident_id: UUID | None
    prevention_record_id: UUID | None
    policy_evaluation_id: UUID
    trace_id: UUID | None
    completed_at: datetime


Traceparent = Annotated[
    str,
    Meta(pattern=TRACEPARENT_PATTERN, description="W3C: the parent span of the event; absent if unknown"),
]
Tracestate = Annotated[
    str, Meta(max_length=TRACESTATE_CHARACTERS_MAX, description="W3C: vendor data that accompanies traceparent")
]

Data = IncidentCreated | IncidentSuppressed | PolicyEvaluated | RunFinalized


class CloudEvent(Struct, frozen=True, kw_only=True):
    """The envelope, CloudEvents 1.0."""

    specversion: Literal["1.0"] = "1.0"
    id: UUID
    source: Literal["/closeout"] = "/closeout"
    type: EventType
    subject: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    traceparent: Traceparent | UnsetType = UNSET
    tracestate: Tracestate | UnsetType = UNSET
    data: Data


class _Traced(Struct):
    """The trace context inside an event's text."""

    traceparent: str | None = None
    tracestate: str | None = None


class _AboutFields(TypedDict):
    tenant_id: str
    run_id: UUID
    run_ref: str | UnsetType
    agent_id: str | None
    is_synthetic: bool


class OutboxEvent(Struct, frozen=True, kw_only=True):
    """One outbox row: an event as it is stored and published."""

    tenant_id: str
    run_id: UUID
    sequence: int
    event_id: UUID
    type: str
    routing_key: str
    body: str
    trace: TraceContext | None = None  # not a column: it is part of the body

    @property
    def key(self) -> RunKey:
        """The key of the event's run."""
        return RunKey(self.tenant_id, self.run_id)


_decoder = msgspec.json.Decoder(_Traced)

# The sequence within a run, and the type, of each kind of data.
_KINDS: dict[type[Data], tuple[int, EventType]] = {
    IncidentCreated: (1, "incident.created"),
    IncidentSuppressed: (1, "incident.suppressed"),
    PolicyEvaluated: (2, "policy.evaluated"),
    RunFinalized: (3, "run.finalized"),
}


def trace_in(body: str) -> TraceContext | None:
    """Return the trace context in an event's text."""
    traced = _decoder.decode(body)
    return TraceContext(traced.traceparent, traced.tracestate) if traced.traceparent else None


def events_for(
    run: CompletedRun,
    finding: Finding,
    evaluation: Evaluation,
    *,
    trace_id: UUID | None,
    now: datetime,
    trace: TraceContext | None = None,
) -> tuple[OutboxEvent, OutboxEvent, OutboxEvent]:
    """Return the three events of *run* in publishing order, each with *trace* if there is one.

    *trace_id* is the id under which the run's steps are stored; null: the run has no trace.
    """
    about: _AboutFields = {
        "tenant_id": run.tenant_id,
        "run_id": run.run_id,
        "run_ref": UNSET if run.run_ref is None else run.run_ref,
        "agent_id": run.agent_id,
        "is_synthetic": run.is_synthetic,
    }
    # A suppressed incident is published under the severity that it would have had.
    severity, _ = severity_of(run)
    evaluated = PolicyEvaluated(
        policy_evaluation_id=evaluation.policy_evaluation_id,
        outcome=evaluation.outcome,
        policies_checked=evaluation.policies_checked,
        violations=evaluation.violations,
        **about,
    )
    finalized = RunFinalized(
        status=run.status,
        incident_id=finding.incident_id if isinstance(finding, Incident) else None,
        prevention_record_id=None if isinstance(finding, Incident) else finding.prevention_record_id,
        policy_evaluation_id=evaluation.policy_evaluation_id,
        trace_id=trace_id,
        completed_at=run.completed_at,
        **about,
    )
    subject = f"{run.tenant_id}/{run.run_ref or run.run_id}"
    return (
        _event(_finding_data(finding, about), severity, subject, now, trace),
        _event(evaluated, evaluation.outcome, subject, now, trace),
        _event(finalized, run.status, subject, now, trace),
    )


def _finding_data(finding: Finding, about: _AboutFields) -> IncidentCreated | IncidentSuppressed:
    if isinstance(finding, Incident):
        return IncidentCreated(
            incident_id=finding.incident_id,
            outcome=finding.outcome,
            severity=finding.severity,
            category=finding.category,
            error_code=finding.error_code,
            **about,
        )
    return IncidentSuppressed(
        prevention_record_id=finding.prevention_record_id,
        policy_id=finding.policy_id,
        error_code=finding.error_code,
        **about,
    )


def _event(data: Data, last_word: str, subject: str, now: datetime, trace: TraceContext | None) -> OutboxEvent:
    sequence, kind = _KINDS[type(data)]
    event_id = uuid7()
    envelope = CloudEvent(
        id=event_id,
        type=kind,
        subject=subject,
        time=now,
        traceparent=trace.traceparent if trace else UNSET,
        tracestate=(trace.tracestate or UNSET) if trace else UNSET,
        data=data,
    )
    return OutboxEvent(
        tenant_id=data.tenant_id,
        run_id=data.run_id,
        sequence=sequence,
        event_id=event_id,
        type=kind,
        routing_key=f"{kind}.{last_word.lower()}",
        body=msgspec.json.encode(envelope).decode(),
        trace=trace,
    )
