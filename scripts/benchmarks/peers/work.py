"""Closeout's rules, which every peer uses, so that the rules cost the same for all.

The peers differ in reading, writing and publishing. Decoding, incident rules, policies and events are Closeout's.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from consumer.contract.events import OutboxEvent, events_for
from consumer.contract.run_message import decode
from domains.incidents.rules import Incident, finding_for
from domains.policies.book import compiled
from domains.policies.rules import Policy, PolicySet, evaluate
from domains.policies.tables import policies
from domains.run import CompletedRun, RunKey
from domains.traces.rules import STATUS_OF

QUEUE = "closeout.run-completed"
EXCHANGE = "governance.events"
CONTENT_TYPE = "application/cloudevents+json"
# Concurrent messages. With 8, 16, 32 on two cores (medians of two rounds) FastStream reached 157, 161, 171 runs/s and
# SQLAlchemy Core 262, 279, 267: within the noise.
AT_ONCE = 16
_POLICY_FIELDS = ("policy_id", "tenant_id", "name", "version", "effect", "severity", "condition")


class Rows(NamedTuple):
    """One run's rows, one per table, and its events."""

    completion: dict[str, Any]
    incident: dict[str, Any] | None
    prevention: dict[str, Any] | None
    evaluation: dict[str, Any]
    trace: dict[str, Any] | None
    events: tuple[OutboxEvent, ...]

    @property
    def key(self) -> RunKey:
        """The run's identity."""
        return RunKey(self.completion["tenant_id"], self.completion["run_id"])


def policies_in_force(rows: list[dict[str, Any]]) -> PolicySet:
    """Compile the policies of the table's *rows*; a peer reads them once, at its start."""
    found = [Policy(**{name: row[name] for name in _POLICY_FIELDS}) for row in rows]
    return PolicySet((policy, compiled(policy.condition)) for policy in found)


SELECT_POLICIES = policies.select().where(policies.c.enabled)


def json_text(value: object) -> str:
    """Serialize a jsonb value with msgspec, which knows the product's types."""
    return _json.encode(value).decode()


_json = msgspec.json.Encoder(decimal_format="number")


def rows_for(body: bytes, book: PolicySet) -> Rows:
    """Decode a message and return its rows and events."""
    run, digest, *_ = decode(body, max_bytes=1_048_576)
    now = datetime.now(UTC)
    evaluation = evaluate(run, book, now=now)
    finding = finding_for(run, suppressed_by=evaluation.suppressed_by, now=now)
    events = events_for(run, finding, evaluation, trace_id=run.trace_id, now=now)
    raised = isinstance(finding, Incident)
    fields = {name: getattr(finding, name) for name in finding.__slots__}
    return Rows(
        _completion(run, digest, now),
        fields if raised else None,
        None if raised else fields,
        {
            "tenant_id": run.tenant_id,
            "run_id": run.run_id,
            "policy_evaluation_id": evaluation.policy_evaluation_id,
            "outcome": evaluation.outcome,
            "policies_checked": evaluation.policies_checked,
            "violations": evaluation.violations,
            "errors": evaluation.errors,
            "evaluated_at": now,
        },
        _trace(run),
        events,
    )


def _completion(run: CompletedRun, digest: bytes, now: datetime) -> dict[str, Any]:
    return {
        "tenant_id": run.tenant_id, "run_id": run.run_id, "agent_id": run.agent_id, "status": run.status,
        "error_code": run.error_code, "payload_digest": digest, "model": run.model, "cost_usd": run.usage.cost_usd,
        "input_tokens": run.usage.input_tokens, "output_tokens": run.usage.output_tokens,
        "started_at": run.started_at, "completed_at": run.completed_at, "is_synthetic": run.is_synthetic,
        "metadata": run.metadata, "received_at": now, "phase": "COMMITTED", "mode": "atomic", "committed_at": now,
    }  # fmt: skip


def _trace(run: CompletedRun) -> dict[str, Any] | None:
    if run.trace_id is None:
        return None
    return {
        "tenant_id": run.tenant_id, "trace_id": run.trace_id, "run_id": run.run_id, "agent_id": run.agent_id,
        "status": STATUS_OF[run.status], "started_at": run.started_at, "completed_at": run.completed_at,
        "steps": run.steps,
    }  # fmt: skip
