"""The incident of each run, by the contract's table."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from domains.incidents.rules import Incident, Prevention, finding_for, severity_of
from tests.support import run_messages as runs

NOW = datetime(2026, 11, 1, 12, 1, tzinfo=UTC)
OUTCOMES = {"succeeded": "SUCCESS", "failed": "FAILURE", "halted": "BLOCKED", "aborted": "ABORTED"}
UNSUCCESSFUL = ("failed", "halted", "aborted")
BY_ERROR_CODE = [
    ("AGENT_CRASH", "CRITICAL", "EXECUTION_FAILURE"),
    ("EXECUTION_TIMEOUT", "HIGH", "EXECUTION_FAILURE"),
    ("STEP_FAILURE", "HIGH", "EXECUTION_FAILURE"),
    ("SKILL_ERROR", "HIGH", "EXECUTION_FAILURE"),
    ("BUDGET_EXCEEDED", "MEDIUM", "BUDGET_EXCEEDED"),
    ("RATE_LIMIT_EXCEEDED", "MEDIUM", "RATE_LIMIT"),
    ("RESOURCE_EXHAUSTION", "MEDIUM", "RESOURCE_EXHAUSTION"),
    ("RETRY_EXHAUSTED", "MEDIUM", "EXECUTION_FAILURE"),
    ("CANCELLED", "LOW", "MANUAL"),
    ("MANUAL_STOP", "LOW", "MANUAL"),
    ("SOMETHING_NEW", "MEDIUM", "EXECUTION_FAILURE"),
    ("AGENT_CRASH_", "MEDIUM", "EXECUTION_FAILURE"),
    (None, "MEDIUM", "EXECUTION_FAILURE"),
]


def incident(*, suppressed_by: UUID | None = None, **changes: Any) -> Incident:
    finding = finding_for(runs.run(**changes), suppressed_by=suppressed_by, now=NOW)
    assert isinstance(finding, Incident)
    return finding


@pytest.mark.parametrize("status", UNSUCCESSFUL)
@pytest.mark.parametrize(("error_code", "severity", "category"), BY_ERROR_CODE)
def test_a_run_that_did_not_succeed_opens_an_incident_by_its_error_code(
    status: str, error_code: str | None, severity: str, category: str
):
    found = incident(status=status, error_code=error_code)
    assert (found.outcome, found.severity, found.category, found.status) == (
        OUTCOMES[status],
        severity,
        category,
        "OPEN",
    )
    assert severity_of(runs.run(status=status, error_code=error_code)) == (severity, category)


@pytest.mark.parametrize("error_code", [code for code, *_ in BY_ERROR_CODE])
def test_a_run_that_succeeded_is_a_closed_success_whatever_its_error_code(error_code: str | None):
    found = incident(status="succeeded", error_code=error_code)
    assert (found.outcome, found.severity, found.category, found.status) == (
        "SUCCESS",
        "NONE",
        "EXECUTION_SUCCESS",
        "CLOSED",
    )
    assert found.error_code == error_code


def test_an_incident_keeps_the_error_text_of_the_run():
    run = runs.run(is_synthetic=True, synthetic_scenario_id="s-1", error_message="kaputt", agent_id=None)
    found = finding_for(run, suppressed_by=None, now=NOW)
    assert isinstance(found, Incident)
    assert found.key == run.key == (found.tenant_id, found.run_id)
    assert (found.error_code, found.error_message, found.agent_id) == ("EXECUTION_TIMEOUT", "kaputt", None)
    assert (found.is_synthetic, found.synthetic_scenario_id, found.created_at) == (True, "s-1", NOW)


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "Run of agent-1 failed: EXECUTION_TIMEOUT"),
        ({"agent_id": None}, "Run failed: EXECUTION_TIMEOUT"),
        ({"agent_id": ""}, "Run failed: EXECUTION_TIMEOUT"),
        ({"error_code": None}, "Run of agent-1 failed"),
        ({"status": "halted", "error_code": "BUDGET_EXCEEDED"}, "Run of agent-1 halted: BUDGET_EXCEEDED"),
        ({"status": "aborted", "agent_id": None, "error_code": None}, "Run aborted"),
        ({"status": "succeeded"}, "Run of agent-1 succeeded"),
    ],
)
def test_the_title_has_agent_status_and_error_code(changes: dict[str, Any], title: str):
    assert incident(**changes).title == title


@pytest.mark.parametrize("status", UNSUCCESSFUL)
def test_a_suppressing_policy_leaves_a_prevention_record_instead(status: str):
    run, policy_id = runs.run(status=status), uuid4()
    found = finding_for(run, suppressed_by=policy_id, now=NOW)
    assert isinstance(found, Prevention)
    assert found.key == run.key
    assert (found.policy_id, found.error_code, found.created_at) == (policy_id, run.error_code, NOW)


def test_a_run_that_succeeded_gets_its_incident_despite_a_suppressing_policy():
    assert incident(suppressed_by=uuid4(), status="succeeded").outcome == "SUCCESS"


def test_every_finding_has_a_unique_id_that_grows_with_time():
    run = runs.run()
    ids = [finding_for(run, suppressed_by=None, now=NOW).incident_id for _ in range(100)]  # type: ignore[union-attr]
    assert len(set(ids)) == 100
    assert {one.version for one in ids} == {7}
