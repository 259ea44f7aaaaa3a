"""The rules for incidents: outcome, severity and category of a run. Pure functions."""

from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Literal
from uuid import UUID

from uuid_utils.compat import uuid7

from domains.run import CompletedRun, RunKey

Outcome = Literal["SUCCESS", "FAILURE", "BLOCKED", "ABORTED"]
Severity = Literal["NONE", "LOW", "MEDIUM", "HIGH", "CRITICAL"]

_OUTCOMES: MappingProxyType[str, Outcome] = MappingProxyType(
    {"succeeded": "SUCCESS", "failed": "FAILURE", "halted": "BLOCKED", "aborted": "ABORTED"}
)

_BY_ERROR_CODE: MappingProxyType[str, tuple[Severity, str]] = MappingProxyType(
    {
        "AGENT_CRASH": ("CRITICAL", "EXECUTION_FAILURE"),
        "EXECUTION_TIMEOUT": ("HIGH", "EXECUTION_FAILURE"),
        "STEP_FAILURE": ("HIGH", "EXECUTION_FAILURE"),
        "SKILL_ERROR": ("HIGH", "EXECUTION_FAILURE"),
        "BUDGET_EXCEEDED": ("MEDIUM", "BUDGET_EXCEEDED"),
        "RATE_LIMIT_EXCEEDED": ("MEDIUM", "RATE_LIMIT"),
        "RESOURCE_EXHAUSTION": ("MEDIUM", "RESOURCE_EXHAUSTION"),
        "RETRY_EXHAUSTED": ("MEDIUM", "EXECUTION_FAILURE"),
        "CANCELLED": ("LOW", "MANUAL"),
        "MANUAL_STOP": ("LOW", "MANUAL"),
    }
)
_ANY_OTHER_ERROR: tuple[Severity, str] = ("MEDIUM", "EXECUTION_FAILURE")


@dataclass(frozen=True, slots=True)
class Incident:
    """An incident: outcome, severity, category, and whether it is open."""

    tenant_id: str
    run_id: UUID
    incident_id: UUID
    outcome: Outcome
    severity: Severity
    category: str
    status: Literal["OPEN", "CLOSED"]
    title: str
    error_code: str | None
    error_message: str | None
    agent_id: str | None
    is_synthetic: bool
    synthetic_scenario_id: str | None
    created_at: datetime

    @property
    def key(self) -> RunKey:
        """The run this incident belongs to."""
        return RunKey(self.tenant_id, self.run_id)


@dataclass(frozen=True, slots=True)
class Prevention:
    """The record that replaces an incident suppressed by a policy."""

    tenant_id: str
    run_id: UUID
    prevention_record_id: UUID
    policy_id: UUID
    error_code: str | None
    created_at: datetime

    @property
    def key(self) -> RunKey:
        """The run this record belongs to."""
        return RunKey(self.tenant_id, self.run_id)


Finding = Incident | Prevention


def severity_of(run: CompletedRun) -> tuple[Severity, str]:
    """Return the severity and category for *run*'s status and error code."""
    if run.status == "succeeded":
        return "NONE", "EXECUTION_SUCCESS"
    return _BY_ERROR_CODE.get(run.error_code or "", _ANY_OTHER_ERROR)


def finding_for(run: CompletedRun, *, suppressed_by: UUID | None, now: datetime) -> Finding:
    """Return *run*'s incident, or its prevention record if policy *suppressed_by* suppressed it.

    A run that succeeded has nothing to suppress and always gets its incident.
    """
    if suppressed_by is not None and run.status != "succeeded":
        return Prevention(run.tenant_id, run.run_id, uuid7(), suppressed_by, run.error_code, now)
    severity, category = severity_of(run)
    outcome = _OUTCOMES[run.status]
    return Incident(
        tenant_id=run.tenant_id,
        run_id=run.run_id,
        incident_id=uuid7(),
        outcome=outcome,
        severity=severity,
        category=category,
        status="CLOSED" if outcome == "SUCCESS" else "OPEN",
        title=_title(run),
        error_code=run.error_code,
        error_message=run.error_message,
        agent_id=run.agent_id,
        is_synthetic=run.is_synthetic,
        synthetic_scenario_id=run.synthetic_scenario_id,
        created_at=now,
    )


def _title(run: CompletedRun) -> str:
    by = f" of {run.agent_id}" if run.agent_id else ""
    why = f": {run.error_code}" if run.error_code and run.status != "succeeded" else ""
    return f"Run{by} {run.status}{why}"
