"""The evaluation of a tenant's policies on one run."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from domains.policies.book import compiled
from domains.policies.cel.conditions import EvaluationError
from domains.policies.cel.visible import Visible
from domains.policies.rules import Evaluation, Policy, PolicySet, evaluate, holds
from domains.run import CompletedRun
from tests.support import run_messages as runs

ALL = None


def policy(condition: str = "true", **changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "policy_id": uuid4(),
        "tenant_id": ALL,
        "name": "rule",
        "version": 1,
        "effect": "flag",
        "severity": "HIGH",
        "condition": condition,
    }
    return Policy(**{**fields, **changes})


def in_force(*policies: Policy) -> PolicySet:
    return PolicySet((one, compiled(one.condition)) for one in policies)


def evaluated(*policies: Policy, **changes: Any) -> Evaluation:
    return evaluate(runs.run(**changes), in_force(*policies))


def names(policies: PolicySet, tenant_id: str) -> list[str]:
    return [found.name for found, _ in policies.of(tenant_id)]


def test_without_policies_there_is_no_violation():
    run = runs.run()
    found = evaluate(run, PolicySet(()))
    assert (found.outcome, found.policies_checked, found.violations, found.errors) == ("no_violation", 0, (), ())
    assert found.suppressed_by is None
    assert found.key == run.key
    assert found.evaluated_at.utcoffset() is not None


def test_a_true_flag_is_a_violation_and_a_false_one_is_only_checked():
    true = policy('run.status == "failed"', name="true", version=3, severity="LOW")
    found = evaluated(true, policy("false", name="false"))
    assert (found.outcome, found.policies_checked, found.errors) == ("violation", 2, ())
    violation = found.violations[0]
    assert len(found.violations) == 1
    assert (violation.policy_id, violation.name, violation.version, violation.severity) == (
        true.policy_id,
        "true",
        3,
        "LOW",
    )


def test_a_flag_applies_to_runs_that_succeeded():
    assert evaluated(policy("true"), status="succeeded").outcome == "violation"


def test_a_tenants_policies_are_its_own_and_those_for_all_tenants():
    policies = in_force(
        policy(name="for all"), policy(name="own", tenant_id="acme"), policy(name="other", tenant_id="globex")
    )
    assert names(policies, "acme") == ["own", "for all"]
    assert names(policies, "globex") == ["other", "for all"]
    assert names(policies, "initech") == ["for all"]
    assert names(policies, "ACME") == ["for all"]


def test_a_policy_of_another_tenant_has_no_effect():
    found = evaluated(
        policy(tenant_id="globex"),
        policy(tenant_id="globex", effect="suppress_incident"),
        policy("run.nope", tenant_id="globex"),
    )
    assert (found.outcome, found.policies_checked, found.suppressed_by) == ("no_violation", 0, None)


def test_a_tenants_own_policies_precede_those_for_all_tenants_each_sorted_by_name():
    policies = [
        policy(name="b"),
        policy(name="z", tenant_id="acme"),
        policy(name="a", version=2),
        policy(name="a", version=1),
        policy(name="c", tenant_id="acme"),
    ]
    for order in (policies, policies[::-1]):
        found = evaluated(*order)
        assert [(violation.name, violation.version) for violation in found.violations] == [
            ("c", 1),
            ("z", 1),
            ("a", 1),
            ("a", 2),
            ("b", 1),
        ]


def test_the_first_true_suppressing_policy_is_recorded_the_tenants_own_first():
    for_all = policy(name="a", effect="suppress_incident")
    own = policy(name="z", effect="suppress_incident", tenant_id="acme")
    own_later = policy(name="zz", effect="suppress_incident", tenant_id="acme")
    false = policy("false", name="b", effect="suppress_incident", tenant_id="acme")
    assert evaluated(for_all, own_later, own, false).suppressed_by == own.policy_id
    assert evaluated(for_all, own, tenant_id="globex").suppressed_by == for_all.policy_id


@pytest.mark.parametrize("status", ["failed", "halted", "aborted"])
def test_a_suppressing_policy_is_counted_as_checked_and_not_as_a_violation(status: str):
    suppressing = policy(effect="suppress_incident")
    found = evaluated(suppressing, status=status)
    assert (found.outcome, found.policies_checked, found.violations) == ("no_violation", 1, ())
    assert found.suppressed_by == suppressing.policy_id


def test_nothing_is_suppressed_for_a_run_that_succeeded():
    assert evaluated(policy(effect="suppress_incident"), status="succeeded").suppressed_by is None


def test_a_run_can_be_flagged_and_suppressed():
    found = evaluated(policy(effect="suppress_incident"), policy())
    assert found.outcome == "violation"
    assert isinstance(found.suppressed_by, UUID)


def test_an_evaluation_error_outranks_a_violation_which_is_still_listed():
    broken, true = policy("run.nope == 1", name="broken", version=7), policy(name="true")
    suppressing = policy(effect="suppress_incident", name="quiet")
    found = evaluated(broken, true, suppressing)
    assert (found.outcome, found.policies_checked) == ("evaluation_error", 3)
    assert [violation.name for violation in found.violations] == ["true"]
    assert [(fault.policy_id, fault.name, fault.version) for fault in found.errors] == [(broken.policy_id, "broken", 7)]
    assert found.errors[0].error == 'NOT_FOUND: Key not found in map : "nope"'
    assert found.suppressed_by == suppressing.policy_id


def test_a_suppressing_policy_that_fails_suppresses_nothing():
    found = evaluated(policy("run.nope", effect="suppress_incident"))
    assert (found.outcome, found.suppressed_by) == ("evaluation_error", None)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (
            "nope == 1",
            "the condition does not compile: line 1, column 1: undeclared reference to 'nope' (in container '')",
        ),
        ("run.status", "the condition returned string; expected true or false"),
        ("1", "the condition does not compile: line 1, column 1: the condition returns int; expected true or false"),
    ],
)
def test_an_invalid_stored_condition_is_an_error_of_its_policy_only(condition: str, words: str):
    found = evaluated(policy(condition, name="a"), policy(name="b"))
    assert found.outcome == "evaluation_error"
    assert [fault.error for fault in found.errors] == [words]
    assert [violation.name for violation in found.violations] == ["b"]


def test_an_exhausted_iteration_budget_is_an_error_of_its_policy():
    steps = [{"index": n, "status": "failed"} for n in range(1000)]
    greedy = policy("run.steps.all(a, run.steps.all(b, a.index != b.index + 5000))", name="greedy")
    found = evaluated(greedy, policy(name="modest"), steps=steps)
    assert [fault.name for fault in found.errors] == ["greedy"]
    assert [violation.name for violation in found.violations] == ["modest"]


@pytest.mark.parametrize("key", ["k" * 4000, "a\x00b", "\x00" * 1000], ids=["long", "nul", "nuls"])
def test_an_error_text_is_bounded_and_contains_no_nul(key: str):
    literal = '"' + key.replace("\x00", "\\x00") + '"'
    found = evaluated(policy(f"run.metadata[{literal}] == 1"))
    words = found.errors[0].error
    assert 0 < len(words) <= 500
    assert "\x00" not in words


def test_every_evaluation_has_a_unique_id():
    first, second = evaluated(), evaluated()
    assert first.policy_evaluation_id != second.policy_evaluation_id
    assert first.policy_evaluation_id.version == 7


@pytest.mark.parametrize(
    ("condition", "fields"),
    [
        ("run.usage.cost_usd > 0.01 && run.error_code == 'EXECUTION_TIMEOUT'", {"usage", "error_code"}),
        ("run.steps.exists(s, s.skill == 'book' && s.cost_usd == null)", {"steps"}),
        ("size(run.steps) == 2 && has(run.model)", {"steps", "model"}),
        ("run['metadata']['region'] == 'eu'", {"metadata"}),
        ("run.completed_at - run.started_at > duration('30s')", {"completed_at", "started_at"}),
        ("run.duration_ms > 30000 && run.trace_id != null", {"duration_ms", "trace_id"}),
        ("run.nonsense == 1", set()),
        ("'retries' in run.metadata && run.metadata.nothing == 1", {"metadata"}),
        ("size(run) > 10", {*CompletedRun.__struct_fields__, "duration_ms", "step_count"}),
        ("run.exists(name, run[name] == 'failed')", {*CompletedRun.__struct_fields__, "duration_ms", "step_count"}),
    ],
)
def test_converting_only_the_fields_read_does_not_change_the_result(condition, fields):
    run, policies = runs.run(), in_force(policy(condition))

    assert policies.visible(run).fields.keys() == fields
    assert result_of(condition, policies.visible(run)) == result_of(condition, Visible(run))


def result_of(condition: str, visible: Visible) -> object:
    try:
        return holds(compiled(condition), visible)
    except EvaluationError as error:
        return str(error)


def test_a_policy_set_converts_the_fields_that_any_compiled_policy_reads():
    policies = in_force(policy("run.status == 'failed'"), policy("run.model == null"), policy("run.("))

    assert policies.visible(runs.run()).fields == {"status": "failed", "model": "gpt-4o"}
