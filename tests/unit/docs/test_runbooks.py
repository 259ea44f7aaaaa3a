"""The on-call guide has a section for each alert, with commands that exist."""

import re

import pytest
from typer.testing import CliRunner

from consumer.cli import app
from tests.deploy.test_alerts import ALERTS
from tests.support.guides import anchors, headings, section
from tests.support.manifests import RUNBOOKS, changed, one

GUIDE = "deploy/prometheus/README.md"
ON_CALL = section(GUIDE, "## For the person on call")


def test_every_alert_has_a_section_in_the_order_of_the_rules():
    assert [heading for heading in headings(GUIDE) if heading.startswith("Closeout")] == list(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_url_of_an_alert_leads_to_its_section(alert):
    base, _, anchor = ALERTS[alert]["annotations"]["runbook_url"].partition("#")
    assert base == RUNBOOKS
    assert anchor == alert.lower()
    assert anchor in anchors(GUIDE)


def test_an_overlay_sets_the_base_of_every_runbook_url(tmp_path):
    base = "https://wiki.internal/closeout/deploy/prometheus/README.md"
    rule = one(changed(tmp_path, components=["monitoring"], runbooks=base), "PrometheusRule")
    urls = [alert["annotations"]["runbook_url"] for group in rule["spec"]["groups"] for alert in group["rules"]]
    assert urls == [f"{base}#{alert.lower()}" for alert in ALERTS]


@pytest.mark.parametrize("alert", ALERTS)
def test_a_section_says_how_urgent_it_is_what_to_check_and_when_it_is_harmless(alert):
    text = section(GUIDE, f"### {alert}")
    assert text.lstrip().startswith(ALERTS[alert]["labels"]["severity"].capitalize() + ".")
    assert "armless" in text
    assert "`" in text


def test_every_command_for_the_person_on_call_exists_with_its_options():
    commands = re.findall(r"`closeout ([^`]+)`", ON_CALL)
    assert len(commands) > 10
    for command in commands:
        words = command.split()
        path = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        done = CliRunner().invoke(app, [*path, "--help"], env={"NO_COLOR": "1", "COLUMNS": "200"})
        assert done.exit_code == 0, command
        for option in (word for word in words if word.startswith("--")):
            assert option in done.stdout, command
