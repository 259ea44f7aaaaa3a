"""``closeout policies test``: which policies' conditions hold on a run, the outcome, and the expectations of CI."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from consumer.cli import app
from consumer.policy_analysis.dry_run import dry_run, policies_of
from domains.incidents.rules import Incident, finding_for
from domains.policies.files import PolicyDraft
from domains.policies.rules import PolicySet, evaluate
from tests.support import run_messages as runs


def draft(name: str = "p", **changes: Any) -> PolicyDraft:
    fields: dict[str, Any] = {"tenant_id": None, "effect": "flag", "severity": "LOW", "condition": "true"}
    return PolicyDraft(name=name, **{**fields, **changes})


def results(tested: Any) -> dict[str, str]:
    return {verdict.name: verdict.result for verdict in tested.policies}


def test_each_policy_of_the_file_has_a_result_in_file_order():
    tested = dry_run(
        [
            draft("true"),
            draft("false", condition="false"),
            draft("fails", condition="run.nothing"),
            draft("other", tenant_id="globex"),
            draft("own", tenant_id="acme"),
            draft("off", enabled=False),
            draft("shadow", mode="shadow"),
        ],
        runs.run(),
    )
    assert list(results(tested).items()) == [
        ("true", "holds"),
        ("false", "does_not_hold"),
        ("fails", "error"),
        ("other", "other_tenant"),
        ("own", "holds"),
        ("off", "off"),
        ("shadow", "holds"),
    ]
    assert (tested.outcome, tested.policies_checked) == ("evaluation_error", 4)
    assert tested.violations == ["true", "own"]
    assert tested.errors == ["fails"]
    assert tested.shadow == {"shadow": "flag"}


@pytest.mark.parametrize(
    ("drafts", "status", "record", "by"),
    [
        ([draft()], "failed", "incident", None),
        ([draft("s", effect="suppress_incident")], "failed", "prevention_record", "s"),
        ([draft("s", effect="suppress_incident")], "succeeded", "incident", None),
        ([draft("s", effect="suppress_incident", mode="shadow")], "failed", "incident", None),
        ([draft("s", effect="suppress_incident", condition="run.nothing")], "failed", "incident", None),
    ],
)
def test_the_dry_run_reports_what_would_be_written(drafts, status, record, by):
    writes = dry_run(drafts, runs.run(status=status)).writes
    assert writes is not None
    assert (writes.record, writes.by) == (record, by)
    if record == "incident":
        assert writes.severity == ("HIGH" if status == "failed" else "NONE")


def test_two_shadow_policies_with_one_name_are_both_reported_each_with_its_scope():
    ours = draft("expensive", tenant_id="acme", mode="shadow", effect="suppress_incident")
    theirs = draft("expensive", tenant_id="globex", mode="shadow")

    tested = dry_run([ours, draft("expensive", mode="shadow"), theirs], runs.run())

    assert tested.shadow == {"acme/expensive": "suppress_incident", "expensive": "flag"}


def test_a_shadow_suppressing_policy_is_not_counted_on_a_run_that_succeeded():
    shadow = draft(effect="suppress_incident", mode="shadow")
    assert dry_run([shadow], runs.run(status="succeeded")).shadow == {}
    assert dry_run([shadow], runs.run()).shadow == {"p": "suppress_incident"}


def test_the_outcome_of_a_partly_known_run_is_reported_unless_it_depends_on_unknown_fields():
    unknown = frozenset({"steps"})
    needs = draft("needs", condition="size(run.steps) > 1")
    tested = dry_run(
        [draft(), draft("shadow", mode="shadow", condition="size(run.steps) > 1")], runs.run(), unknown=unknown
    )
    assert (tested.outcome, tested.unknown, tested.shadow) == ("violation", ["steps"], {})
    open_ = dry_run([draft(), needs], runs.run(), unknown=unknown)
    assert (open_.outcome, open_.writes, open_.violations) == (None, None, ["p"])
    assert results(open_)["needs"] == "unknown"


DRAFTS = st.lists(
    st.builds(
        PolicyDraft,
        name=st.sampled_from("abc"),
        tenant_id=st.sampled_from([None, "acme", "globex"]),
        effect=st.sampled_from(["flag", "suppress_incident"]),
        severity=st.just("LOW"),
        condition=st.sampled_from(["true", "false", "run.nothing", "run.status == 'failed'"]),
        mode=st.sampled_from(["enforce", "shadow"]),
        enabled=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda one: (one.name, one.tenant_id),
)


@given(DRAFTS, st.sampled_from(["succeeded", "failed", "halted"]))
@settings(max_examples=200, deadline=None)
def test_a_dry_run_agrees_with_the_evaluation_of_the_worker(drafts, status):
    run = runs.run(status=status)
    tested = dry_run(drafts, run)
    entries = policies_of(drafts)
    names = {policy.policy_id: policy.name for _, policy, _ in entries}
    real = evaluate(run, PolicySet((policy, condition) for _, policy, condition in entries))
    assert (tested.outcome, tested.policies_checked) == (real.outcome, real.policies_checked)
    assert sorted(tested.violations) == sorted(violation.name for violation in real.violations)
    assert sorted(tested.errors) == sorted(fault.name for fault in real.errors)
    finding = finding_for(run, suppressed_by=real.suppressed_by, now=real.evaluated_at)
    assert tested.writes is not None
    assert tested.writes.by == (None if isinstance(finding, Incident) else names[finding.policy_id])


POLICIES = """
- name: expensive run
  effect: flag
  severity: MEDIUM
  condition: run.usage.cost_usd != null && run.usage.cost_usd > 5.0
- name: too many retries
  tenant_id: acme
  effect: flag
  severity: LOW
  mode: shadow
  condition: run.metadata.retries > 3
- {name: elsewhere, tenant_id: globex, effect: flag, severity: LOW, condition: "true"}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICIES)
    return str(path)


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.json"
    path.write_bytes(runs.body(usage={"cost_usd": 7.25}, metadata={}))
    return str(path)


def invoked(*words: str, status: int = 0, standard_input: bytes | None = None) -> str:
    # Neither server's address is set: the command needs none.
    environ: dict[str, str | None] = {"DATABASE_URL": None, "AMQP_URL": None, "NO_COLOR": "1"}
    found = CliRunner().invoke(app, ["policies", "test", *words], env=environ, input=standard_input)
    assert found.exit_code == status, found.output
    return found.output


def test_the_command_prints_the_result_of_each_policy_and_the_reason(file, run_file):
    output = invoked(file, "--run", run_file)
    assert "holds          expensive run (flag MEDIUM, all tenants)" in output
    assert "true     run.usage.cost_usd > 5.0" in output
    assert "run.usage.cost_usd = 7.25" in output
    assert "error          too many retries (flag LOW, tenant acme, in shadow)" in output
    assert "run.metadata.retries is missing" in output
    assert "skipped        elsewhere (flag LOW, tenant globex): of another tenant" in output
    assert "Evaluation: violation, 1 checked; flagged by expensive run" in output
    assert "Written: an incident, HIGH EXECUTION_FAILURE" in output
    assert "In shadow: too many retries, result error, without effect" in output


def test_the_command_prints_json_and_reads_standard_input(file, run_file):
    document = json.loads(invoked(file, "--run", "-", "--json", standard_input=Path(run_file).read_bytes()))
    first = document["trial"]["policies"][0]
    assert (first["result"], first["parts"]["join"]) == ("holds", "all")
    assert first["values"] == [{"path": "run.usage.cost_usd", "state": "known", "value": 7.25}]
    assert document["trial"]["writes"]["record"] == "incident"
    assert document["expectations"] == []


def test_met_expectations_exit_0_and_an_unmet_one_exits_1_with_its_name(file, run_file):
    invoked(file, "--run", run_file, "--expect", "expensive run", "--expect-not", "globex/elsewhere", status=1)
    invoked(file, "--run", run_file, "--expect", "expensive run")
    output = invoked(file, "--run", run_file, "--expect-not", "expensive run", "--expect", "elsewhere", status=1)
    assert "expensive run: expected: does not hold; found: holds" in output
    assert "elsewhere: expected: holds; found: belongs to another tenant" in output
    output = invoked(file, "--run", run_file, "--expect-not", "acme/too many retries", status=1)
    assert "acme/too many retries: expected: does not hold; found: fails to evaluate" in output


def test_an_expectation_of_an_unknown_policy_is_a_usage_error(file, run_file):
    output = invoked(file, "--run", run_file, "--expect", "expensive", status=2)
    assert "--expect: found 'expensive'; expected one of the file's policies: expensive run, too many retries" in output
    output = invoked(file, "--run", run_file, "--expect-not", "expensive", status=2)
    assert output.startswith("--expect-not: found 'expensive'")


def test_a_message_that_would_be_parked_is_refused_with_the_error_of_the_worker(file, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_bytes(runs.body(status="done"))
    output = invoked(file, "--run", str(bad), status=1)
    assert 'a worker would park this message: schema_violation: status: found "done"' in output


def test_an_invalid_file_exits_1_with_its_line_and_an_unreadable_one_exits_2(file, run_file, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("- {name: a, effect: flag, severity: LOW, condition: run.}\n")
    assert "broken.yaml:1: condition: line 1" in invoked(str(broken), "--run", run_file, status=1)
    assert "FILE: cannot read" in invoked(str(tmp_path / "none.yaml"), "--run", run_file, status=2)
    assert "--run: cannot read" in invoked(file, "--run", str(tmp_path / "none.json"), status=2)
    assert "expected only one on standard input" in invoked("-", "--run", "-", status=2)
