"""The Grafana dashboard as a file; its queries are run in tests/integration/telemetry/test_monitoring.py."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from consumer.metrics import Metrics
from tests.deploy.test_alerts import ALERTS

TEXT = (Path(__file__).parents[2] / "deploy" / "grafana" / "closeout.json").read_text()
DASHBOARD = json.loads(TEXT)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Grafana's names of the units used here; Grafana would display a misspelled name as a suffix.
UNITS = {"none", "ops", "s", "percentunit", "bytes"}


def by_title(panel: dict[str, str]) -> str:
    return panel["title"]


def test_the_dashboard_can_be_imported_anywhere():
    assert (DASHBOARD["id"], DASHBOARD["uid"]) == (None, None)
    assert DASHBOARD["schemaVersion"] >= 36  # Grafana 9
    first = DASHBOARD["templating"]["list"][0]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")
    assert TEXT.count('"datasource": {') == len(re.findall(r'"uid": "\$\{datasource\}"', TEXT))
    assert "http" not in TEXT


def test_panels_have_unique_ids_and_titles_and_do_not_overlap():
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=by_title)
def test_every_panel_has_a_description_a_known_unit_and_named_lines(panel):
    assert panel["description"].endswith(".")
    unit = panel["options"]["yAxis"]["unit"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS
    assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
    for target in panel["targets"]:
        assert target["datasource"] == SOURCE
        assert target["legendFormat"]
        # A Grafana variable as the range: a fixed range would be empty, or wrong, when zoomed in or out.
        assert set(re.findall(r"\[(.*?)\]", target["expr"])) <= {"$__rate_interval", "24h"}
        assert 'instance=~"$instance"' in target["expr"]


@pytest.mark.parametrize("panel", PANELS, ids=by_title)
def test_every_label_in_a_legend_is_kept_by_its_query(panel):
    for target in panel["targets"]:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            kept = re.search(r"\bby \(([\w, ]+)\)", target["expr"])
            assert label in (kept[1].split(", ") if kept else ["instance", "job"])


def test_every_metric_is_on_the_dashboard():
    for metric in Metrics().described:
        assert metric.name in TEXT


def test_the_dashboard_names_only_existing_alerts():
    assert set(re.findall(r"Closeout[A-Z]\w+", TEXT)) <= set(ALERTS)
