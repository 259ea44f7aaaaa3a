"""The books after the storm: what was published against what the database, the broker and the subscriber hold."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from soak_run.traffic import Hearing, Publishing
from soak_run.worker_processes import MEBIBYTE

# A worker that has lived through its first quarter has its pools, plans and caches; past that it may grow by so much.
GROWTH_BYTES = 20 * MEBIBYTE
SAMPLES_MIN = 60


@dataclass(slots=True)
class Verdict:
    """What was counted, and what is wrong; empty *violations*: nothing is."""

    counts: dict[str, float | int | str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def demand(self, holds: bool, words: str) -> None:  # noqa: FBT001 - reads like an assertion
        """Note *words* as a violation unless it *holds*."""
        if not holds:
            self.violations.append(words)

    def print(self, console: Console, *, as_json: bool) -> None:
        """Print it for a person, or as one JSON document."""
        if as_json:
            print(json.dumps(asdict(self), indent=2))
            return
        table = Table("what", "found", box=None)
        for name, value in self.counts.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        console.print(table)
        for violation in self.violations[:50]:
            console.print(f"VIOLATION {violation}", style="red", markup=False)
        console.print(f"{len(self.violations)} violations" if self.violations else "every run is there exactly once")


async def compare(engine: AsyncEngine, published: Publishing, heard: Hearing, verdict: Verdict) -> None:
    """Compare the runs that were published with the rows and the events that came of them."""
    async with engine.connect() as conn:
        rows = (await conn.execute(text("SELECT tenant_id, run_id, phase FROM governance.run_completions"))).all()
        rollbacks = (await conn.execute(text("SELECT count(*) FROM governance.rollbacks"))).scalar_one()
    stored = {f"{row.tenant_id}/{row.run_id}": row.phase for row in rows}
    confirmed = {run for run, yes in published.runs.items() if yes}
    lost = confirmed - stored.keys()
    partial = [run for run, phase in stored.items() if phase != "EVENTS_PUBLISHED"]
    unheard = [run for run in stored if None in heard.ids.get(run, [None])]
    verdict.counts |= {
        "runs published": len(published.runs),
        "duplicates published": published.duplicates,
        "sent again for want of a confirm": published.resent,
        "runs stored": len(stored),
        "lost": len(lost),
        "not at EVENTS_PUBLISHED": len(partial),
        "rolled-back attempts": rollbacks,
        "events delivered": heard.deliveries,
        "events repeated": heard.repeated,
        "runs with all three events": heard.complete,
        "events published out of order": heard.out_of_order,
        "events the broker gave back late": heard.returned_late,
        "runs with an event missing": len(unheard),
    }
    verdict.demand(len(confirmed) == len(published.runs), f"{len(published.runs) - len(confirmed)} never confirmed")
    verdict.demand(not lost, f"lost: {_some(sorted(lost))}")
    verdict.demand(not stored.keys() - published.runs.keys(), "rows of runs that nobody published")
    verdict.demand(not partial, f"not at EVENTS_PUBLISHED: {_some(partial)}")
    verdict.demand(not unheard, f"an event never came: {_some(unheard)}")
    verdict.demand(not heard.out_of_order, f"{heard.out_of_order} events were published out of their run's order")
    verdict.violations += heard.faults


def judge_memory(samples: Sequence[tuple[float, int]], verdict: Verdict) -> None:
    """Compare the memory of the worker that was spared: its second quarter of life with its last."""
    sizes = [size for _, size in samples]
    if len(sizes) < SAMPLES_MIN:
        verdict.counts["memory"] = "the run was too short to say"
        return
    quarter = len(sizes) // 4
    before, after = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
    tenths = [sizes[len(sizes) * n // 10] // MEBIBYTE for n in range(10)]
    verdict.counts["worker 0's memory, MiB over time"] = " ".join(map(str, [*tenths, sizes[-1] // MEBIBYTE]))
    grown = (after - before) / MEBIBYTE
    verdict.demand(after - before < GROWTH_BYTES, f"worker 0's memory grew by {grown:.0f} MiB between its quarters")


def _some(runs: Sequence[str]) -> str:
    return f"{len(runs)} runs: {', '.join(runs[:5])}"
