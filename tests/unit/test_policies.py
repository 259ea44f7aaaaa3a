"""Conditions, what they decide, and the files they come from."""

import time
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.policies.book import compiled
from domains.policies.conditions import Condition, ConditionError, EvaluationError, Visible
from domains.policies.files import PolicyFileError, read_policies
from domains.policies.rules import Policy, PolicySet, evaluate
from tests import runs


def policy(condition: str, *, tenant_id=None, name="p", effect="flag", policy_id=None) -> Policy:
    return Policy(
        policy_id=policy_id or uuid4(),
        tenant_id=tenant_id,
        name=name,
        version=1,
        effect=effect,
        severity="LOW",
        condition=condition,
    )


def policy_set(*found: Policy) -> PolicySet:
    return PolicySet((p, compiled(p.condition)) for p in found)


@pytest.mark.parametrize(
    ("condition", "line", "column"),
    [
        ("run.status ==", 1, 14),
        ("run.status == 'failed' &&\n  nonsense(1)", 2, 11),
        ("1 + 1", 1, 1),
        ("'text'", 1, 1),
        ("x.y", 1, 2),
        ("\ud800", 1, 1),
        ("run.a" + " && run.a" * 600, 1, 1),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_condition_that_does_not_compile_is_refused_with_its_position(condition, line, column):
    with pytest.raises(ConditionError) as refusal:
        Condition(condition)
    assert (refusal.value.line, refusal.value.column) == (line, column)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("run.status == 'failed'", True),
        ("run.duration_ms == 30500", True),
        ("run.usage.cost_usd > 0.0124 && run.usage.cost_usd < 0.0126", True),
        ("run.steps.exists(s, s.status == 'failed' && s.duration_ms > 1000)", True),
        ("timestamp(run.completed_at) - timestamp(run.started_at) > duration('30s')", True),
        ("has(run.metadata.region) && run.metadata.region == 'eu'", True),
        ("run.agent_id.matches('^agent-[0-9]+$')", True),
        ("run.tenant_id == 'other'", False),
    ],
)
def test_conditions_see_the_messages_fields_and_the_duration(condition, holds):
    assert Condition(condition).holds(Visible(runs.run())) is holds


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("run.nothing == 1", "nothing"),
        ("run.duration_ms / 0 > 1", "divide by zero"),
        ("run.status", "expected true or false"),
        ("run.error_message.matches('(')", "regular expression"),
        ("run.steps.all(a, run.steps.all(b, a.index + b.index >= 0))", "budget"),
    ],
)
def test_a_condition_that_has_no_answer_says_why(condition, words):
    run = runs.run(steps=[{"index": n, "status": "succeeded"} for n in range(1000)])
    with pytest.raises(EvaluationError, match=words):
        Condition(condition).holds(Visible(run))


@pytest.mark.parametrize(
    "condition",
    [
        "run.steps.map(s, run.steps.map(t, t.index)).size() > 0",
        "run.steps.all(s, run.error_message.matches('(x+x+)+y') == false)",
        "run.steps.map(s, run.error_message + run.error_message).size() > 0",
        "run.steps.all(a, run.steps.all(b, run.error_message.matches('(a|b|c|x)*z') == false))",
    ],
)
def test_the_cost_of_an_evaluation_is_bounded(condition):
    run = runs.run(
        error_message="x" * 500_000, steps=[{"index": n, "skill": "x" * 400, "status": "failed"} for n in range(1000)]
    )
    compiled_condition = Condition(condition)
    started = time.perf_counter()
    evaluate(run, PolicySet([(policy(condition), compiled_condition)]))
    assert time.perf_counter() - started < 3


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(metadata=st.dictionaries(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), scalars))
def test_every_valid_run_can_be_shown_to_a_condition(metadata):
    run = runs.run(metadata={**dict(list(metadata.items())[:60]), "huge": 10**400, "negative": -(10**400)})
    assert Condition("run.status == 'failed' && size(run.metadata) > 0").holds(Visible(run))


def test_a_tenant_has_its_own_policies_and_those_for_all_and_never_anothers():
    mine, everyones, theirs = (policy("true", tenant_id=t, name=n) for t, n in [("acme", "a"), (None, "b"), ("b", "c")])
    evaluation = evaluate(runs.run(), policy_set(everyones, theirs, mine))
    assert [violation.name for violation in evaluation.violations] == ["a", "b"]
    assert (evaluation.outcome, evaluation.policies_checked) == ("violation", 2)
    assert evaluate(runs.run(tenant_id="nobody"), policy_set(mine, theirs)).outcome == "no_violation"


def test_a_condition_that_fails_is_named_and_the_others_still_count():
    evaluation = evaluate(runs.run(), policy_set(policy("run.nope", name="broken"), policy("true", name="fine")))
    assert evaluation.outcome == "evaluation_error"
    assert [(fault.name, "nope" in fault.error) for fault in evaluation.errors] == [("broken", True)]
    assert [violation.name for violation in evaluation.violations] == ["fine"]


def test_a_stored_condition_that_does_not_compile_is_an_evaluation_error_not_the_end():
    evaluation = evaluate(runs.run(), policy_set(policy("((", name="by hand")))
    assert evaluation.outcome == "evaluation_error"
    assert "does not compile" in evaluation.errors[0].error


def test_suppression_is_for_runs_that_did_not_succeed_and_the_tenants_own_policy_comes_first():
    ids = [UUID(int=n) for n in range(3)]
    found = policy_set(
        policy("true", name="a", effect="suppress_incident", policy_id=ids[0]),
        policy("true", name="z", tenant_id="acme", effect="suppress_incident", policy_id=ids[1]),
        policy("true", name="b", effect="suppress_incident", policy_id=ids[2]),
    )
    failed = evaluate(runs.run(), found)
    assert (failed.suppressed_by, failed.outcome, failed.violations) == (ids[1], "no_violation", ())
    assert evaluate(runs.run(tenant_id="other"), found).suppressed_by == ids[0]
    assert evaluate(runs.run(status="succeeded"), found).suppressed_by is None


FILE = """\
policies:
  - name: first
    effect: flag
    severity: HIGH
    condition: run.status == "failed"
  - name: second
    tenant_id: acme
    effect: suppress_incident
    severity: LOW
    enabled: false
    condition: |
      run.is_synthetic &&
      run.status != "succeeded"
"""


def test_a_policy_file_may_be_yaml_json_or_a_bare_list():
    first, second = read_policies(FILE, source="f")
    assert (first.name, first.tenant_id, first.enabled, first.condition) == (
        "first",
        None,
        True,
        'run.status == "failed"',
    )
    assert (second.tenant_id, second.effect, second.enabled) == ("acme", "suppress_incident", False)
    json = '[{"name": "a", "effect": "flag", "severity": "LOW", "condition": "true"}]'
    assert read_policies(json, source="f")[0].name == "a"
    assert read_policies("policies: []", source="f") == []


def test_all_faults_of_a_file_are_named_at_once_each_with_its_line():
    faulty = (
        FILE.replace("severity: HIGH", "severity: BAD")
        .replace("effect: suppress_incident", "efect: flag")
        .replace('run.status != "succeeded"', "run.status !=")
    )
    with pytest.raises(PolicyFileError) as refusal:
        read_policies(faulty, source="p.yaml")
    assert [line.split(";")[0][:58] for line in str(refusal.value).splitlines()] == [
        "p.yaml:4: severity: found 'BAD'",
        "p.yaml:8: efect: not a field of a policy",
        "p.yaml:6: effect: missing",
        "p.yaml:13: condition: line 2, column 14: Syntax error: mis",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "policies: 5",
        "- 5",
        "- [a]",
        "- {1: 2}",
        "{",
        "\t",
        "a: &x 1\npolicies: [*x]",
        "- !!python/object:os.system {}",
        "- {name: a, effect: flag, severity: LOW, condition: 2026-01-01}",
        "- {[a]: b}",
        "\x00",
        "- ? {a: b}\n  : c",
        "- {name: a, effect: [flag], severity: {}, condition: 'true'}",
        "[" * 5000,
        "- !!binary x",
        "<<: 1",
        "- {name: a, effect: flag, severity: LOW, condition: 'true'}\n" * 2,
    ],
    ids=lambda text: text[:25],
)
def test_what_is_no_policy_file_is_refused_in_words(text):
    with pytest.raises(PolicyFileError, match="f:"):
        read_policies(text, source="f")
