"""The alert rules and their scenarios, checked by promtool."""

import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers.binaries.debian_program import PROMETHEUS

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "closeout.rules.yaml"
SCENARIOS = sorted((Path(__file__).parent / "alerts").glob("*.yaml"))
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}


def promtool(*words: str | Path) -> str:
    done = subprocess.run([PROMETHEUS.find() / "usr/bin/promtool", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_rules_and_the_example_configuration():
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "--lint-fatal", RULES)
    assert "SUCCESS" in promtool("check", "config", RULES.with_name("prometheus.yaml"))


@pytest.mark.parametrize("scenarios", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_has_the_expected_alerts(scenarios):
    assert "SUCCESS" in promtool("test", "rules", scenarios)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_scenario_that_fires_and_a_healthy_one_that_does_not(alert):
    tests = [test for path in SCENARIOS for test in yaml.safe_load(path.read_text())["tests"]]
    mine = [test["alert_rule_test"] for test in tests if test["name"].startswith(f"{alert}: ")]
    fires = [any(check["exp_alerts"] for check in checks) for checks in mine]
    assert True in fires
    assert False in fires
    assert {check["alertname"] for checks in mine for check in checks} == {alert}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_severity_a_summary_a_description_and_a_runbook(alert):
    rule = ALERTS[alert]
    assert alert.startswith("Closeout")
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["description"].endswith(".")


def test_every_expression_and_every_duration_has_its_reason_above_it():
    lines = RULES.read_text().splitlines()
    for before, line in pairwise(lines):
        if re.match(r"\s+(expr|for):", line):
            assert before.strip().startswith("#"), line
