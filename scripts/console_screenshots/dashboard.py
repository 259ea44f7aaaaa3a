"""What ``deploy/grafana/closeout.json`` shows: each panel with the answers to its queries."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers.prometheus import PrometheusServer

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "closeout.json"
STEP_SECONDS = 1
# What Grafana puts in for its variables: everything, and four scrapes (one a second here).
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": f"{4 * STEP_SECONDS}s"}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: where it lies (in the dashboard's grid of 24 columns), how it is drawn, and its lines by name."""

    title: str
    kind: str
    place: Mapping[str, int]
    unit: str
    field: Mapping[str, Any]
    lines: Sequence[tuple[str, Points]]


def answered(prometheus: PrometheusServer, start: float, end: float) -> list[Panel]:
    """Ask *prometheus* every query of the dashboard over that time, in seconds since 1970."""
    return [_panel(panel, prometheus, start, end) for panel in json.loads(DASHBOARD.read_text())["panels"]]


def _panel(panel: Mapping[str, Any], prometheus: PrometheusServer, start: float, end: float) -> Panel:
    field = panel.get("fieldConfig", {}).get("defaults", {})
    unit = panel["options"]["yAxis"]["unit"] if panel["type"] == "heatmap" else field.get("unit", "none")
    lines = [line for target in panel.get("targets", ()) for line in _lines(target, prometheus, start, end)]
    return Panel(panel["title"], panel["type"], panel["gridPos"], unit, field, lines)


def _lines(
    target: Mapping[str, str], prometheus: PrometheusServer, start: float, end: float
) -> Iterator[tuple[str, Points]]:
    query = target["expr"]
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    answer = prometheus.api("query_range", query=query, start=str(start), end=str(end), step=str(STEP_SECONDS))
    for series in answer["result"]:
        name = _named(target["legendFormat"], series["metric"])
        points = [(float(at), float(value)) for at, value in series["values"]]
        yield name, [(at, value) for at, value in points if not math.isnan(value)]


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)
