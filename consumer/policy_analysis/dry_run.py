"""Evaluates policies of a file on one run, without a database."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal
from uuid import UUID

from msgspec import Struct
from uuid_utils.compat import uuid7

from domains.incidents.rules import Incident, finding_for
from domains.policies.cel.conditions import Condition
from domains.policies.cel.visible import Visible
from domains.policies.explain import Explained, Value, ask, explain, values_read
from domains.policies.files import PolicyDraft
from domains.policies.rules import (
    Effect,
    Evaluation,
    Mode,
    Outcome,
    Policy,
    PolicySet,
    Severity,
    acts_on,
    evaluate,
)
from domains.run import CompletedRun

Result = Literal["holds", "does_not_hold", "error", "unknown", "other_tenant", "off"]
_RESULTS: dict[str, Result] = {
    "true": "holds", "false": "does_not_hold", "error": "error", "unknown": "unknown",
}  # fmt: skip


class Verdict(Struct, frozen=True, kw_only=True):
    """The result of one policy. ``parts`` and ``values`` explain it; null and empty if it was not evaluated."""

    name: str
    tenant_id: str | None
    effect: Effect
    severity: Severity
    mode: Mode
    result: Result
    error: str | None
    parts: Explained | None
    values: list[Value]


class Written(Struct, frozen=True, kw_only=True):
    """The row that would be written: an incident, or the prevention record of the policy *by*."""

    record: Literal["incident", "prevention_record"]
    by: str | None = None
    severity: str | None = None
    category: str | None = None


class DryRun(Struct, frozen=True, kw_only=True):
    """The results of the policies of a file for one run.

    ``outcome`` and ``writes`` are null if they depend on ``unknown`` fields, which are not stored.
    """

    tenant_id: str
    run_id: UUID
    status: str
    error_code: str | None
    unknown: list[str]
    policies: list[Verdict]
    policies_checked: int
    outcome: Outcome | None
    violations: list[str]
    errors: list[str]
    shadow: dict[str, str]
    writes: Written | None


def policies_of(drafts: Sequence[PolicyDraft]) -> list[tuple[PolicyDraft, Policy, Condition]]:
    """Return the compiled policies that *drafts* would enforce or put in shadow; disabled ones are omitted."""
    return [
        (
            draft,
            Policy(
                policy_id=uuid7(),
                tenant_id=draft.tenant_id,
                name=draft.name,
                version=0,
                effect=draft.effect,
                severity=draft.severity,
                condition=draft.condition,
                shadow=draft.mode == "shadow",
            ),
            Condition(draft.condition),
        )
        for draft in drafts
        if draft.enabled
    ]


def dry_run(drafts: Sequence[PolicyDraft], run: CompletedRun, *, unknown: frozenset[str] = frozenset()) -> DryRun:
    """Evaluate the policies of a file on *run*, as if they alone were applied; its *unknown* fields are not stored.

    The outcome comes from the function that the worker uses.
    """
    entries = policies_of(drafts)
    visible = Visible(run, unknown=unknown)
    asked = {id(draft): _verdict(draft, condition, visible) for draft, _, condition in entries if _applies(draft, run)}
    verdicts = [asked.get(id(draft)) or _about(draft, _why_not(draft)) for draft in drafts]
    evaluation = evaluate(run, PolicySet((policy, condition) for _, policy, condition in entries))
    open_question = any(_is(verdict, "unknown") for verdict in verdicts)
    names = {policy.policy_id: policy.name for _, policy, _ in entries}
    return DryRun(
        tenant_id=run.tenant_id,
        run_id=run.run_id,
        status=run.status,
        error_code=run.error_code,
        unknown=sorted(unknown),
        policies=verdicts,
        policies_checked=evaluation.policies_checked,
        outcome=None if open_question else evaluation.outcome,
        violations=[one.name for one in verdicts if _is(one, "holds") and one.effect == "flag"],
        errors=[one.name for one in verdicts if _is(one, "error")],
        shadow=_shadow(verdicts, run),
        writes=None if open_question else _written(run, evaluation, names),
    )


def _applies(draft: PolicyDraft, run: CompletedRun) -> bool:
    return draft.tenant_id in {None, run.tenant_id}


def _verdict(draft: PolicyDraft, condition: Condition, visible: Visible) -> Verdict:
    answer, error = ask(condition, visible)
    parts, values = explain(condition, visible), values_read(condition, visible)
    return _about(draft, _RESULTS[answer], error=error, parts=parts, values=values)


def _about(
    draft: PolicyDraft,
    result: Result,
    *,
    error: str | None = None,
    parts: Explained | None = None,
    values: Sequence[Value] = (),
) -> Verdict:
    return Verdict(
        name=draft.name,
        tenant_id=draft.tenant_id,
        effect=draft.effect,
        severity=draft.severity,
        mode=draft.mode,
        result=result,
        error=error,
        parts=parts,
        values=list(values),
    )


def _why_not(draft: PolicyDraft) -> Result:
    return "other_tenant" if draft.enabled else "off"


def _is(verdict: Verdict, result: Result) -> bool:
    return verdict.result == result and verdict.mode == "enforce"


def _shadow(verdicts: Sequence[Verdict], run: CompletedRun) -> dict[str, str]:
    """Return the result of each shadow policy; if two have one name, the tenant's is TENANT/NAME."""
    names = Counter(verdict.name for verdict in verdicts if verdict.mode == "shadow")
    found: dict[str, str] = {}
    for verdict in verdicts:
        name = f"{verdict.tenant_id}/{verdict.name}" if names[verdict.name] > 1 and verdict.tenant_id else verdict.name
        if verdict.mode == "shadow" and verdict.result == "holds" and acts_on(verdict.effect, run):
            found[name] = verdict.effect
        elif verdict.mode == "shadow" and verdict.result == "error":
            found[name] = "error"
    return found


def _written(run: CompletedRun, evaluation: Evaluation, names: dict[UUID, str]) -> Written:
    finding = finding_for(run, suppressed_by=evaluation.suppressed_by, now=evaluation.evaluated_at)
    if isinstance(finding, Incident):
        return Written(record="incident", severity=finding.severity, category=finding.category)
    return Written(record="prevention_record", by=names[finding.policy_id])
