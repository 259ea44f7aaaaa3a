"""Compares the published runs with the database, the broker and the subscriber after the faults."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from soak_run.traffic import Publishing, Subscriber
from soak_run.worker_processes import MEBIBYTE

# After the first quarter a worker has filled its pools, plans and caches.
MAX_GROWTH_BYTES = 20 * MEBIBYTE
MIN_SAMPLES = 60


@dataclass(slots=True)
class Verdict:
    """Counts, and the violations found."""

    counts: dict[str, float | int | str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def require(self, holds: bool, violation: str) -> None:  # noqa: FBT001 - reads like an assertion
        """Add *violation* unless it *holds*."""
        if not holds:
            self.violations.append(violation)

    def print(self, console: Console, *, as_json: bool) -> None:
        """Print a table and the violations, or one JSON document."""
        if as_json:
            print(json.dumps(asdict(self), indent=2))
            return
        table = Table("measure", "value", box=None)
        for name, value in self.counts.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        console.print(table)
        for violation in self.violations[:50]:
            console.print(f"VIOLATION {violation}", style="red", markup=False)
        console.print(
            f"{len(self.violations)} violations"
            if self.violations
            else "no violations: every run was closed out exactly once"
        )


async def compare(engine: AsyncEngine, published: Publishing, subscriber: Subscriber, verdict: Verdict) -> None:
    """Compare the published runs with their rows and events."""
    async with engine.connect() as conn:
        rows = (await conn.execute(text("SELECT tenant_id, run_id, phase FROM governance.run_completions"))).all()
        rollbacks = (await conn.execute(text("SELECT count(*) FROM governance.rollbacks"))).scalar_one()
    stored = {f"{row.tenant_id}/{row.run_id}": row.phase for row in rows}
    confirmed = {run for run, yes in published.runs.items() if yes}
    lost = confirmed - stored.keys()
    partial = [run for run, phase in stored.items() if phase != "EVENTS_PUBLISHED"]
    incomplete = [run for run in stored if None in subscriber.ids.get(run, [None])]
    verdict.counts |= {
        "runs published": len(published.runs),
        "duplicates published": published.duplicates,
        "resent without a confirm": published.resent,
        "runs stored": len(stored),
        "lost": len(lost),
        "not at EVENTS_PUBLISHED": len(partial),
        "rolled-back attempts": rollbacks,
        "events delivered": subscriber.deliveries,
        "events repeated": subscriber.repeated,
        "runs with all three events": subscriber.complete,
        "events published out of order": subscriber.out_of_order,
        "events redelivered late by the broker": subscriber.returned_late,
        "runs with an event missing": len(incomplete),
    }
    verdict.require(
        len(confirmed) == len(published.runs), f"{len(published.runs) - len(confirmed)} messages were never confirmed"
    )
    verdict.require(not lost, f"lost: {_some(sorted(lost))}")
    verdict.require(not stored.keys() - published.runs.keys(), "rows exist for runs that were not published")
    verdict.require(not partial, f"not at EVENTS_PUBLISHED: {_some(partial)}")
    verdict.require(not incomplete, f"an event is missing: {_some(incomplete)}")
    verdict.require(
        not subscriber.out_of_order, f"{subscriber.out_of_order} events were published out of their run's order"
    )
    verdict.violations += subscriber.faults


def check_memory(sizes: Sequence[int], verdict: Verdict) -> None:
    """Compare worker 0's median memory in the second and the last quarter of its samples."""
    if len(sizes) < MIN_SAMPLES:
        verdict.counts["memory"] = "not measured: the soak was too short"
        return
    quarter = len(sizes) // 4
    before, after = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
    tenths = [sizes[len(sizes) * n // 10] // MEBIBYTE for n in range(10)]
    verdict.counts["memory of worker 0 over time, MiB"] = " ".join(map(str, [*tenths, sizes[-1] // MEBIBYTE]))
    grown = (after - before) / MEBIBYTE
    verdict.require(
        after - before < MAX_GROWTH_BYTES,
        f"the memory of worker 0 grew by {grown:.0f} MiB from its second to its last quarter",
    )


def _some(runs: Sequence[str]) -> str:
    return f"{len(runs)} runs: {', '.join(runs[:5])}"
