"""The events that are published once a run is closed out."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from consumer.contract.events import CONTENT_TYPE, OutboxEvent, events_for
from domains.incidents.rules import Incident, Prevention, finding_for
from domains.policies.book import compiled
from domains.policies.rules import Policy, PolicySet, evaluate
from domains.run import CompletedRun
from tests.support import run_messages as runs

NOW = datetime(2026, 11, 1, 12, 1, 2, 345678, tzinfo=UTC)
ABOUT = {"tenant_id", "run_id", "agent_id", "is_synthetic"}
ENVELOPE = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"}
# The events of the contract.
FIELDS = {
    "incident.created": ABOUT | {"incident_id", "outcome", "severity", "category", "error_code"},
    "incident.suppressed": ABOUT | {"prevention_record_id", "policy_id", "error_code"},
    "policy.evaluated": ABOUT | {"policy_evaluation_id", "outcome", "policies_checked", "violations"},
    "run.finalized": ABOUT
    | {"status", "incident_id", "prevention_record_id", "policy_evaluation_id", "trace_id", "completed_at"},
}


def policy(condition: str, **changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "policy_id": uuid4(), "tenant_id": None, "name": "rule", "version": 2, "effect": "flag", "severity": "HIGH",
    }  # fmt: skip
    return Policy(**{**fields, **changes}, condition=condition)


def events_of(run: CompletedRun, *policies: Policy) -> tuple[OutboxEvent, ...]:
    evaluation = evaluate(run, PolicySet((one, compiled(one.condition)) for one in policies))
    return events_for(
        run,
        finding_for(run, suppressed_by=evaluation.suppressed_by, now=NOW),
        evaluation,
        trace_id=run.trace_id,
        now=NOW,
    )


def data(event: OutboxEvent) -> dict[str, Any]:
    content = json.loads(event.body)["data"]
    assert isinstance(content, dict)
    return content


SUPPRESS = policy("true", effect="suppress_incident")
FLAG = policy("true")
BROKEN = policy("run.nope")


@pytest.mark.parametrize(
    ("changes", "policies", "keys"),
    [
        ({}, (), ["incident.created.high", "policy.evaluated.no_violation", "run.finalized.failed"]),
        (
            {"error_code": "AGENT_CRASH"},
            (FLAG,),
            ["incident.created.critical", "policy.evaluated.violation", "run.finalized.failed"],
        ),
        (
            {"status": "succeeded"},
            (SUPPRESS,),
            ["incident.created.none", "policy.evaluated.no_violation", "run.finalized.succeeded"],
        ),
        (
            {"status": "aborted", "error_code": "CANCELLED"},
            (BROKEN, FLAG),
            ["incident.created.low", "policy.evaluated.evaluation_error", "run.finalized.aborted"],
        ),
        (
            {"status": "halted", "error_code": None},
            (SUPPRESS,),
            ["incident.suppressed.medium", "policy.evaluated.no_violation", "run.finalized.halted"],
        ),
        (
            {},
            (SUPPRESS, FLAG),
            ["incident.suppressed.high", "policy.evaluated.violation", "run.finalized.failed"],
        ),
    ],
)
def test_a_run_has_three_events_in_order_with_the_contracts_routing_keys(
    changes: dict[str, Any], policies: tuple[Policy, ...], keys: list[str]
):
    events = events_of(runs.run(**changes), *policies)
    assert [event.routing_key for event in events] == keys
    assert [event.sequence for event in events] == [1, 2, 3]
    assert [event.type for event in events] == [key.rpartition(".")[0] for key in keys]


@pytest.mark.parametrize("policies", [(), (SUPPRESS,), (FLAG, BROKEN)], ids=["plain", "suppressed", "flagged"])
@pytest.mark.parametrize("status", ["succeeded", "failed"])
@pytest.mark.parametrize(
    "changes", [{}, {"agent_id": None, "error_code": None, "trace_id": None}], ids=["full", "null"]
)
def test_an_event_has_exactly_the_contracts_fields_nulls_included(
    policies: tuple[Policy, ...], status: str, changes: dict[str, Any]
):
    for event in events_of(runs.run(status=status, **changes), *policies):
        envelope = json.loads(event.body)
        assert set(envelope) == ENVELOPE
        assert set(envelope["data"]) == FIELDS[event.type]


def test_the_envelope_is_a_cloud_event_about_the_run():
    run = runs.run(tenant_id="acme-eu.1")
    assert CONTENT_TYPE == "application/cloudevents+json"
    for event in events_of(run):
        envelope = json.loads(event.body)
        assert envelope["specversion"] == "1.0"
        assert envelope["id"] == str(event.event_id)
        assert envelope["source"] == "/closeout"
        assert envelope["type"] == event.type
        assert envelope["subject"] == f"acme-eu.1/{run.run_id}"
        assert envelope["time"] == "2026-11-01T12:01:02.345678Z"
        assert envelope["datacontenttype"] == "application/json"
        assert event.key == run.key == (event.tenant_id, event.run_id)


def test_every_event_has_a_unique_id_and_building_again_makes_new_ones():
    run = runs.run()
    first, second = events_of(run), events_of(run)
    assert len({event.event_id for event in (*first, *second)}) == 6
    assert sorted(event.event_id for event in first) == [event.event_id for event in first]


def test_an_incident_event_has_the_incidents_fields():
    run = runs.run(is_synthetic=True)
    evaluation = evaluate(run, PolicySet(()))
    finding = finding_for(run, suppressed_by=None, now=NOW)
    assert isinstance(finding, Incident)
    created, evaluated, finalized = events_for(run, finding, evaluation, trace_id=run.trace_id, now=NOW)
    about = {"tenant_id": "acme", "run_id": str(run.run_id), "agent_id": "agent-1", "is_synthetic": True}
    assert data(created) == {
        **about,
        "incident_id": str(finding.incident_id),
        "outcome": "FAILURE",
        "severity": "HIGH",
        "category": "EXECUTION_FAILURE",
        "error_code": "EXECUTION_TIMEOUT",
    }
    assert data(evaluated) == {
        **about,
        "policy_evaluation_id": str(evaluation.policy_evaluation_id),
        "outcome": "no_violation",
        "policies_checked": 0,
        "violations": [],
    }
    assert data(finalized) == {
        **about,
        "status": "failed",
        "incident_id": str(finding.incident_id),
        "prevention_record_id": None,
        "policy_evaluation_id": str(evaluation.policy_evaluation_id),
        "trace_id": str(run.trace_id),
        "completed_at": "2026-11-01T12:00:30.500000Z",
    }


def test_a_suppressed_incident_event_names_the_prevention_record_and_policy():
    run = runs.run(trace_id=None)
    policy_id = uuid4()
    finding = finding_for(run, suppressed_by=policy_id, now=NOW)
    assert isinstance(finding, Prevention)
    suppressed, _, finalized = events_for(run, finding, evaluate(run, PolicySet(())), trace_id=run.trace_id, now=NOW)
    assert data(suppressed) == {
        "tenant_id": "acme",
        "run_id": str(run.run_id),
        "agent_id": "agent-1",
        "is_synthetic": False,
        "prevention_record_id": str(finding.prevention_record_id),
        "policy_id": str(policy_id),
        "error_code": "EXECUTION_TIMEOUT",
    }
    assert data(finalized)["incident_id"] is None
    assert data(finalized)["prevention_record_id"] == str(finding.prevention_record_id)
    assert data(finalized)["trace_id"] is None


def test_violations_are_listed_by_policy():
    flag = policy("true", name="slow", severity="LOW")
    _, evaluated, _ = events_of(runs.run(), flag, BROKEN)
    assert data(evaluated)["policies_checked"] == 2
    assert data(evaluated)["violations"] == [
        {"policy_id": str(flag.policy_id), "name": "slow", "version": 2, "severity": "LOW"}
    ]


def test_events_contain_no_free_text_of_the_run():
    run = runs.run(error_message="a customer's secret", metadata={"secret": "secret"}, model="secret")
    assert all("secret" not in event.body for event in events_of(run, FLAG, BROKEN))


def test_any_agent_name_survives_json_encoding():
    agent = 'ä"\\\u2028\U0001f600\x01'
    assert {data(event)["agent_id"] for event in events_of(runs.run(agent_id=agent))} == {agent}
    assert all(UUID(data(event)["run_id"]).version == 4 for event in events_of(runs.run()))
