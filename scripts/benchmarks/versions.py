"""This version next to another checkout's, interleaved in one run: rate, CPU per run and latency, as ratios."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import latency
from benchmarks.arena import Arena
from benchmarks.race import lap
from benchmarks.subjects import Subject, closeout

THIS, OTHER = "this version", "the other version"


def compare(place: Arena, console: Console, command: Path, rounds: int, logs: Path) -> dict[str, Any]:
    """Measure both versions in turn; return each measure's ratio, this version over the other, one per round.

    *command* is the other checkout's ``closeout``. A ratio pairs two measurements of one round, so that a change of the
    machine's speed between rounds does not count.
    """
    # The path of this program's modules would lead the other version to this one's code.
    ours = closeout(THIS, PYTHONPATH="")
    subjects = (ours, replace(ours, name=OTHER, argv=(str(command), "worker")))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        # Forwards, then backwards, so that neither version always runs first.
        for subject in subjects if number % 2 == 0 else subjects[::-1]:
            for measure, value in _measure(place, subject, number + 1, logs).items():
                found[measure][subject.name].append(value)
                console.print(f"round {number + 1}  {subject.name:18} {measure:28} {value:10,.3f}", style="dim")
    table = Table("", THIS, OTHER, "ratio (min to max)", box=None)
    ratios: dict[str, Any] = {}
    for measure, by_version in found.items():
        pairs = [ours / other for ours, other in zip(by_version[THIS], by_version[OTHER], strict=True)]
        ratios[measure] = {"ratio": median(pairs), "ratios": pairs, **by_version}
        table.add_row(
            measure, f"{median(by_version[THIS]):,.3f}", f"{median(by_version[OTHER]):,.3f}",
            f"{median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})",
        )  # fmt: skip
    console.print(table)
    return ratios


def _measure(place: Arena, subject: Subject, seed: int, logs: Path) -> dict[str, float]:
    found = lap(place, subject, seed, logs)
    measures = {"runs/s": found.rate, "worker CPU ms per run": found.cost["worker CPU ms"]}
    for rate in latency.RATES:
        for name, value in latency.measure(place, subject, rate, seed, logs)._asdict().items():
            measures[f"{name} ms at {rate} runs/s"] = value
    return measures
