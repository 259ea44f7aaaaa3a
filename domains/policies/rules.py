"""Evaluates policies on a run. Pure functions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from msgspec import Struct
from uuid_utils.compat import uuid7

from domains.policies.cel.conditions import Condition, ConditionError, EvaluationError
from domains.policies.cel.visible import Visible
from domains.run import CompletedRun, RunKey

Effect = Literal["flag", "suppress_incident"]
Severity = Literal["NONE", "LOW", "MEDIUM", "HIGH", "CRITICAL"]
Mode = Literal["enforce", "shadow"]
Outcome = Literal["no_violation", "violation", "evaluation_error"]

# Characters of an evaluation error that are stored.
_ERROR_MAX = 500


class Policy(Struct, frozen=True, kw_only=True):
    """A stored policy. A shadow policy is evaluated on every run and has no effect."""

    policy_id: UUID
    tenant_id: str | None
    name: str
    version: int
    effect: Effect
    severity: Severity
    condition: str
    shadow: bool = False


class PolicyVersion(Struct, frozen=True, kw_only=True):
    """The version of a policy that was evaluated."""

    policy_id: UUID
    name: str
    version: int


class Violation(PolicyVersion, frozen=True, kw_only=True):
    """A ``flag`` policy whose condition was true."""

    severity: Severity


class PolicyFault(PolicyVersion, frozen=True, kw_only=True):
    """A policy whose condition failed to evaluate, and why."""

    error: str


class Shadowed(PolicyVersion, frozen=True, kw_only=True, omit_defaults=True):
    """The result of a shadow policy, or why its condition failed to evaluate."""

    result: Literal["flag", "suppress_incident", "error"]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of all policies of a tenant for one run.

    ``shadow`` has the results of shadow policies; nothing else depends on them.
    """

    tenant_id: str
    run_id: UUID
    policy_evaluation_id: UUID
    outcome: Outcome
    policies_checked: int
    violations: tuple[Violation, ...]
    errors: tuple[PolicyFault, ...]
    evaluated_at: datetime
    suppressed_by: UUID | None = None
    shadow: tuple[Shadowed, ...] = ()

    @property
    def key(self) -> RunKey:
        """The run that was evaluated."""
        return RunKey(self.tenant_id, self.run_id)


Compiled = tuple[Policy, Condition | ConditionError]


class PolicySet:
    """The enforced and shadow policies, compiled, and which of them apply to each tenant."""

    __slots__ = ("_by_tenant", "_for_all", "_needed")

    def __init__(self, compiled: Iterable[Compiled]) -> None:
        ordered = sorted(compiled, key=lambda pair: (pair[0].tenant_id is None, pair[0].name, pair[0].version))
        self._for_all = tuple(pair for pair in ordered if pair[0].tenant_id is None)
        own: dict[str, list[Compiled]] = {}
        for pair in ordered:
            if pair[0].tenant_id is not None:
                own.setdefault(pair[0].tenant_id, []).append(pair)
        # A tenant's own policies come first, and take precedence over those for all tenants.
        self._by_tenant: Mapping[str, tuple[Compiled, ...]] = {
            tenant: (*pairs, *self._for_all) for tenant, pairs in own.items()
        }
        self._needed = _fields_read(condition for _, condition in ordered)

    def of(self, tenant_id: str) -> tuple[Compiled, ...]:
        """Return the policies that apply to *tenant_id*: its own, then those for all, each by name."""
        return self._by_tenant.get(tenant_id, self._for_all)

    def visible(self, run: CompletedRun) -> Visible:
        """Return *run* as these policies' conditions see it: only the fields that one of them reads."""
        return Visible(run) if self._needed is None else Visible(run, needed=self._needed)


def _fields_read(conditions: Iterable[Condition | ConditionError]) -> frozenset[str] | None:
    """Return the fields that occur in *conditions*; null: all."""
    names: frozenset[str] = frozenset()
    for condition in conditions:
        if isinstance(condition, Condition):
            if condition.reads.fields is None:
                return None
            names |= condition.reads.fields
    return names


def evaluate(run: CompletedRun, policies: PolicySet, *, now: datetime | None = None) -> Evaluation:
    """Evaluate the policies that apply to *run*; a failed condition is part of the result, never an exception.

    ``evaluation_error`` outranks ``violation``, so that an incomplete result does not appear complete; violations of
    the other policies are still listed. The evaluation is dated *now*, by default the current time.
    """
    applying = policies.of(run.tenant_id)
    violations: list[Violation] = []
    errors: list[PolicyFault] = []
    shadow: list[Shadowed] = []
    suppressed_by: UUID | None = None
    visible = policies.visible(run) if applying else None
    for policy, condition in applying:
        try:
            true = visible is not None and holds(condition, visible)
        except EvaluationError as error:
            if policy.shadow:
                shadow.append(Shadowed(**_named(policy), result="error", error=error_text(error)))
            else:
                errors.append(PolicyFault(**_named(policy), error=error_text(error)))
            continue
        if not (true and acts_on(policy.effect, run)):
            continue
        if policy.shadow:
            shadow.append(Shadowed(**_named(policy), result=policy.effect))
        elif policy.effect == "flag":
            violations.append(Violation(**_named(policy), severity=policy.severity))
        else:
            suppressed_by = suppressed_by or policy.policy_id
    return Evaluation(
        tenant_id=run.tenant_id,
        run_id=run.run_id,
        policy_evaluation_id=uuid7(),
        outcome="evaluation_error" if errors else "violation" if violations else "no_violation",
        policies_checked=sum(not policy.shadow for policy, _ in applying),
        violations=tuple(violations),
        errors=tuple(errors),
        evaluated_at=now or datetime.now(UTC),
        suppressed_by=suppressed_by,
        shadow=tuple(shadow),
    )


def holds(condition: Condition | ConditionError, visible: Visible) -> bool:
    """Return whether *condition* is true; raise :class:`EvaluationError` if it fails or does not compile."""
    if isinstance(condition, ConditionError):
        raise EvaluationError(f"the condition does not compile: {condition}")
    return condition.holds(visible)


def acts_on(effect: Effect, run: CompletedRun) -> bool:
    """Return whether a true condition has *effect* on *run*: a successful run has nothing to suppress."""
    return effect == "flag" or run.status != "succeeded"


def _named(policy: Policy) -> dict[str, Any]:
    return {"policy_id": policy.policy_id, "name": policy.name, "version": policy.version}


def error_text(error: EvaluationError) -> str:
    """Return the stored text of *error*, without NUL, which jsonb cannot hold."""
    return str(error).replace("\x00", "\\u0000")[:_ERROR_MAX]
