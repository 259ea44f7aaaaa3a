"""The metrics of a worker that has processed every kind of message: promtool, Prometheus, alerts and dashboard."""

import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from servers import PostgresServer, RabbitServer
from servers.binaries.debian_program import PROMETHEUS
from sqlalchemy import text

from consumer.metrics import Metrics
from consumer.version import installed_version
from tests.conftest import _TEMPLATE
from tests.support.monitored_worker import DEPLOY, KEPT_BACK, PREFETCH, RULES, Monitored, monitored
from tests.support.waiting import until_blocking
from tests.unit.docs.test_runbooks import ON_CALL

DASHBOARD = json.loads((DEPLOY / "grafana" / "closeout.json").read_text())
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
# Counted only where a rollback's response is lost with the connection; no policy is in shadow here.
NEVER_HERE = {
    'closeout_transactions_total{mode="atomic",result="failed"}',
    'closeout_transactions_total{mode="legacy",result="failed"}',
    'closeout_phase_entered_total{phase="FAILED"}',
    'closeout_policy_shadow_total{result="error"}',
    'closeout_policy_shadow_total{result="flag"}',
    'closeout_policy_shadow_total{result="suppress_incident"}',
}


@pytest.fixture(scope="module")
def seen(
    postgres: PostgresServer, rabbit: RabbitServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Monitored]:
    with monitored(postgres, rabbit, tmp_path_factory.mktemp("monitored"), _TEMPLATE) as found:
        yield found


def test_promtool_accepts_a_real_scrape(seen):
    checked = subprocess.run(
        [PROMETHEUS.find() / "usr/bin/promtool", "check", "metrics"],
        input=seen.scrape()[0], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_both_exposition_formats_contain_the_same_values(seen):
    (plain, plain_type), (open_text, open_type) = seen.scrape(), seen.scrape(OPENMETRICS)
    assert plain_type.startswith("text/plain")
    assert open_type.startswith("application/openmetrics-text")
    assert open_text.endswith("# EOF\n")

    def named(families) -> set[tuple[str, str]]:
        samples = [sample for family in families for sample in family.samples]
        return {(s.name, str(sorted(s.labels.items()))) for s in samples if not s.name.endswith("_created")}

    assert named(read_openmetrics(open_text)) == named(read_text(plain))


def test_every_series_of_every_counter_is_incremented(seen):
    counted = {name for name, value in _samples(seen.scrape()[0]).items() if value > 0}
    every = {name for name in _samples(seen.scrape()[0]) if "_total" in name and name.startswith("closeout_")}
    assert every - counted == NEVER_HERE


def test_no_label_names_a_tenant_a_run_or_an_agent(seen):
    labels = {label for family in read_text(seen.scrape()[0]) for s in family.samples for label in s.labels}
    assert labels == {"field", "outcome", "result", "mode", "phase", "type", "reason", "le", "version", "queue"}
    assert "acme" not in seen.scrape()[0]


def test_a_scrape_stays_small(seen):
    assert len(seen.scrape(OPENMETRICS)[0]) < 40_000


def test_a_worker_reports_paused_until_it_consumes_and_while_its_broker_is_unavailable(seen):
    assert seen.query("closeout_consumer_paused") == {seen.worker: 0, seen.idle: 1}
    # At its start, then for the closed connections: up, down, up, down.
    assert seen.query("changes(closeout_consumer_paused[10m])")[seen.worker] >= 3
    assert seen.query("min_over_time(closeout_consumer_paused[10m])")[seen.idle] == 1


def test_the_coordinator_gauge_follows_the_setting(seen):
    assert seen.query("closeout_coordinator_enabled") == {seen.worker: 1, seen.idle: 0}


def test_deliveries_in_flight_rise_to_the_prefetch_count_and_return_to_zero(seen):
    assert seen.query("max_over_time(closeout_inflight_deliveries[10m])") == {seen.worker: PREFETCH, seen.idle: 0}
    assert seen.query("closeout_inflight_deliveries") == {seen.worker: 0, seen.idle: 0}


def test_every_worker_reports_the_outbox_gauges_while_events_cannot_be_published(seen):
    for gauge, least in (("pending", KEPT_BACK), ("oldest_seconds", 1)):
        highest = seen.query(f"max_over_time(closeout_outbox_{gauge}[10m])")
        assert set(highest) == {seen.worker, seen.idle}
        assert min(highest.values()) >= least
    assert seen.query("closeout_outbox_pending")[seen.worker] == 0


def test_build_info_has_the_version_and_process_metrics_are_served(seen):
    assert f'closeout_build_info{{version="{installed_version()}"}} 1.0' in seen.scrape()[0]
    assert seen.query("process_resident_memory_bytes")[seen.worker] > 20_000_000
    assert seen.query("process_cpu_seconds_total")[seen.worker] > 0.1


def test_a_worker_without_outbox_statistics_does_not_hide_those_of_another(seen):
    both = 'label_replace(vector(130), "instance", "a", "", "") or label_replace(vector(NaN), "instance", "b", "", "")'
    assert seen.query(f"max({both}) > 120") == {"": 130}
    assert seen.query("max(vector(NaN)) > 120") == {}


@pytest.mark.parametrize(
    ("title", "expr"),
    [
        (f"{panel['title']} {target['refId']}", target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ],
)
def test_every_query_of_the_dashboard_returns_data(seen, title, expr):
    rows = seen.rows(_filled_in(expr))
    assert rows, f"{title}: nothing"
    assert any(not math.isnan(float(row["value"][1])) for row in rows), f"{title}: only NaN"


def test_the_dashboards_variables_and_annotations_return_data(seen):
    for variable in DASHBOARD["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert match
        series, label = match.groups()
        assert {row["metric"][label] for row in seen.rows(_filled_in(series))}
    assert seen.rows(DASHBOARD["annotations"]["list"][0]["expr"])


def test_every_rule_is_evaluated_without_an_error(seen):
    rules = [rule for group in seen.prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(_alerts())
    assert {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in rules} == {
        (name, "ok", "") for name in _alerts()
    }
    # A worker that was paused a moment ago is pending at the next evaluation.
    until_blocking(lambda: _states(seen)["CloseoutWorkerPaused"] != "inactive", what="the alert of a paused worker")
    states = _states(seen)
    # Only the alerts of the recent events: a false alert would page a person.
    assert {name for name, state in states.items() if state == "firing"} == {
        "CloseoutMessagesParked",
        "CloseoutLegacyFallbacks",
    }
    assert states["CloseoutCoordinatorOff"] == states["CloseoutWorkerPaused"] == "pending"


def _states(seen) -> dict[str, str]:
    groups = seen.prometheus.api("rules")["groups"]
    return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}


def test_alerts_and_dashboard_use_only_existing_metrics_labels_and_values(seen):
    """Prometheus does not report a misspelt name: the alert would never fire."""
    scraped = seen.scrape()[0]
    names = set(re.findall(r"^(\w+)", scraped, re.MULTILINE)) | {"up", "ALERTS"}
    pairs = set(re.findall(r'(\w+)="([^"]+)"', scraped))
    exprs = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())] + list(_alerts().values())
    for expr in exprs:
        plain = re.sub(r'"[^"]*"', '""', expr)
        for name in re.findall(r"\b(?:closeout|process)_\w+", plain):
            assert name in names, expr
        for label, value in re.findall(r'(\w+)!?="([^"]+)"', expr):
            assert (label, value) in pairs, expr


def test_every_metric_is_documented_and_every_documented_metric_is_served(seen):
    described = {metric.name for metric in Metrics().described}
    served = {family.name for family in read_openmetrics(seen.scrape(OPENMETRICS)[0])}
    assert {name.removesuffix("_total").removesuffix("_info") for name in described} == {
        name.removesuffix("_info") for name in served if name.startswith("closeout_")
    }


async def test_every_query_of_the_runbook_runs(engine):
    queries = re.findall(r"```sql\n(.*?)```", ON_CALL, re.DOTALL)
    assert len(queries) == 2
    async with engine.connect() as conn:
        for query in queries:
            await conn.execute(text(query))


def _filled_in(expr: str) -> str:
    """Return *expr* with Grafana's variables replaced as a fresh dashboard does."""
    filled = expr.replace("$__rate_interval", "2m").replace("$job", ".*").replace("$instance", ".*")
    assert "$" not in filled
    return filled


def _samples(scraped: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in scraped.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def _alerts() -> dict[str, str]:
    groups = yaml.safe_load(Path(RULES).read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
