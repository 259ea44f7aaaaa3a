"""Writes measurements as tables, JSON and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from benchmarks.race import Lap

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend first

OURS, THEIRS, LIMIT = "#2b6cb0", "#a0aec0", "#718096"


def throughput(console: Console, laps: Mapping[str, Sequence[Lap]], ours: str) -> list[dict[str, Any]]:
    """Print rates and costs, and return the rows. A ratio is the median of the ratios of each round."""
    table = Table("", "runs/s", "min to max", f"{ours} is faster by the factor", box=None)
    names = list(next(iter(laps.values()))[0].cost)
    costs = Table("cost per run", *names, box=None)
    rows: list[dict[str, Any]] = []
    for name, found in laps.items():
        rates = [lap.rate for lap in found]
        ratios = [mine.rate / lap.rate for mine, lap in zip(laps[ours], found, strict=True)]
        row: dict[str, Any] = {
            "name": name, "rate": median(rates), "rates": rates, "ratio": median(ratios), "ratios": ratios,
            "cost": {cost: median(lap.cost[cost] for lap in found) for cost in names if found[0].cost},
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            name, f"{row['rate']:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}",
            f"{row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )  # fmt: skip
        if found[0].cost:
            costs.add_row(
                name, *(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in row["cost"].values())
            )
    console.print(table)
    console.print()
    console.print(costs)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], ours: str, limits: Sequence[str], file: Path) -> None:
    """Draw the rates, the slowest on top, with the range over the rounds."""
    ordered = sorted(rows, key=lambda row: -row["rate"])
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), dpi=110)
    for place, row in enumerate(ordered):
        name = row["name"]
        colour = OURS if name.startswith(ours) else LIMIT if name in limits else THEIRS
        hatch = "//" if name in limits else None
        axes.barh(place, row["rate"], color="white" if hatch else colour, edgecolor=colour, hatch=hatch, height=0.66)
        axes.plot([min(row["rates"]), max(row["rates"])], [place, place], color="#1a202c", linewidth=1.2)
        axes.text(max(row["rates"]) * 1.01, place, f" {row['rate']:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["name"] for row in ordered], fontsize=9)
    axes.set_xlabel("runs per second (median; line: min to max); hatched: a limit, not the same work")
    axes.xaxis.label.set_fontsize(8)
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def factors(found: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw by which factor each command is faster, on a logarithmic axis, with the range over the rounds."""
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(found) + 1.2), dpi=110)
    for place, (name, values) in enumerate(reversed(list(found.items()))):
        axes.barh(place, median(values), color=OURS, height=0.66)
        axes.plot([min(values), max(values)], [place, place], color="#1a202c", linewidth=1.2)
        axes.text(max(values) * 1.03, place, f" {median(values):.1f}", va="center", fontsize=9)
        axes.annotate(name, (0, place), (-6, 0), ("axes fraction", "data"), "offset points", ha="right", va="center")
    axes.set_xscale("log")
    axes.axvline(1, color=LIMIT, linewidth=1)
    axes.set_yticks([])
    axes.set_xlabel("faster by this factor (median; line: min to max)")
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, file: Path) -> None:
    """Draw runs per second over a setting, one line per series."""
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=110)
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xscale("log")
    places = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(places, [f"{x:,.0f}" for x in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel("runs/s")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Merge *found* into the JSON document in *file*."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **found}, indent=1, sort_keys=True) + "\n")
