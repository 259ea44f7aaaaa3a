"""The operators' table of conditions names only metrics, alerts, checks, log events and tests that exist."""

import re
from pathlib import Path

import pytest

from consumer.metrics import Metrics
from tests.deploy.test_alerts import ALERTS
from tests.support.guides import section

ROOT = Path(__file__).parents[3]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in section("deploy/prometheus/README.md", "## What reports which condition").splitlines()
    if line.startswith("| ")
][2:]


def sources(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / folder).rglob("*.py")))


CONSUMER, DIAGNOSIS, TESTS = sources("consumer"), sources("consumer/diagnosis"), sources("tests")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_only_what_exists(row: list[str]):
    _, readyz, metric, alert, doctor, log, test = row

    assert readyz.startswith(("200", "503"))
    assert set(re.findall(r"`(\w+)`", metric)) <= {described.name for described in Metrics().described}
    assert set(re.findall(r"\[(\w+)\]", alert)) <= set(ALERTS)
    assert all(f'"{name}"' in DIAGNOSIS for name in re.findall(r"`([^`]+)`", doctor))
    assert all(f'"{event}"' in CONSUMER for event in re.findall(r"`([^`]+)`", log))
    assert f"def test_{test.strip('`')}(" in TESTS
    assert any(cell != "-" for cell in (metric, alert, doctor, log)), "a condition that nothing reports"


def test_the_table_has_a_row_for_each_of_the_worker_s_states():
    named = " ".join(" ".join(row) for row in ROWS)

    for metric in (
        "closeout_consumer_paused",
        "closeout_parking_refused",
        "closeout_outbox_set_aside",
        "closeout_intake_queue_unavailable",
    ):
        assert metric in named
