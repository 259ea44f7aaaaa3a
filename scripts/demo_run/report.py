"""Checks that every run is complete in the database and at the subscriber, and prints a summary."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from domains.run import CompletedRun, RunKey


@dataclass(slots=True)
class Received:
    """Received events: their types per run in order of arrival, without repetitions, and the number of deliveries."""

    by_run: dict[UUID, list[str]] = field(default_factory=lambda: defaultdict(list))
    ids: set[str] = field(default_factory=set)
    deliveries: int = 0
    types: Counter[str] = field(default_factory=Counter)


_EVENTS = ("incident.", "policy.evaluated", "run.finalized")

_COMPLETE = text(
    """
    SELECT r.tenant_id, r.run_id, r.phase, r.committed_at,
           (SELECT count(*) FROM governance.incidents i WHERE (i.tenant_id, i.run_id) = (r.tenant_id, r.run_id)) +
           (SELECT count(*) FROM governance.prevention_records p
             WHERE (p.tenant_id, p.run_id) = (r.tenant_id, r.run_id)) AS findings,
           (SELECT count(*) FROM governance.policy_evaluations e
             WHERE (e.tenant_id, e.run_id) = (r.tenant_id, r.run_id)) AS evaluations,
           (SELECT count(*) FROM governance.traces t
             WHERE (t.tenant_id, t.run_id) = (r.tenant_id, r.run_id) AND t.status <> 'running') AS traces
      FROM governance.run_completions r
    """
)

_TALLIES = {
    "incidents by severity": "SELECT severity, count(*) FROM governance.incidents GROUP BY 1 ORDER BY 2 DESC",
    "prevented incidents": "SELECT 'suppressed by policy', count(*) FROM governance.prevention_records",
    "policy evaluations": "SELECT outcome, count(*) FROM governance.policy_evaluations GROUP BY 1 ORDER BY 2 DESC",
    "traces": "SELECT status, count(*) FROM governance.traces GROUP BY 1 ORDER BY 2 DESC",
    "events still in the outbox": "SELECT 'waiting', count(*) FROM governance.outbox_events",
    "rollbacks": "SELECT 'recorded', count(*) FROM governance.rollbacks",
}


async def report(
    engine: AsyncEngine,
    console: Console,
    *,
    runs: Sequence[CompletedRun],
    published_at: Mapping[RunKey, float],
    received: Received,
    extra: Mapping[str, Mapping[str, int]],
) -> list[str]:
    """Print a summary of stored rows and received events; return one line per incomplete run."""
    async with engine.connect() as conn:
        stored = {RunKey(row.tenant_id, row.run_id): row for row in await conn.execute(_COMPLETE)}
        tallies = {title: await _tally(conn, query) for title, query in _TALLIES.items()}
    tallies["events received"] = dict(received.types)
    _print(console, {**tallies, **extra})
    _print_speed(console, published_at, {key: row.committed_at.timestamp() for key, row in stored.items()})
    faults: list[str] = []
    for run in runs:
        row = stored.get(run.key)
        if row is None:
            faults.append(f"{run.tenant_id}/{run.run_id}: not closed out")
            continue
        found = (row.phase, row.findings, row.evaluations, row.traces)
        if found != ("EVENTS_PUBLISHED", 1, 1, int(run.trace_id is not None)):
            faults.append(f"{run.tenant_id}/{run.run_id}: phase, findings, evaluations, traces are {found}")
        events = received.by_run[run.run_id]
        if len(events) != len(_EVENTS) or not all(map(str.startswith, events, _EVENTS)):
            faults.append(f"{run.tenant_id}/{run.run_id}: events are {events}")
    return faults


async def _tally(conn: AsyncConnection, query: str) -> dict[str, int]:
    return {str(name): int(number) for name, number in await conn.execute(text(query))}


def _print(console: Console, tallies: Mapping[str, Mapping[str, int]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for title, tally in tallies.items():
        rows = list(tally.items()) or [("none", 0)]
        for position, (name, number) in enumerate(rows):
            table.add_row(title if position == 0 else "", name, f"{number:,}")
    console.print(table)


def _print_speed(console: Console, published: Mapping[RunKey, float], committed: Mapping[RunKey, float]) -> None:
    latencies = sorted(committed[key] - at for key, at in published.items() if key in committed)
    if len(latencies) < 2:
        return
    percentiles = statistics.quantiles(latencies, n=100, method="inclusive")
    seconds = max(committed[key] for key in published if key in committed) - min(published.values())
    console.print(
        f"\n{len(latencies) / seconds:,.0f} runs/s; publish to commit p50 {percentiles[49] * 1000:,.0f} ms, "
        f"p99 {percentiles[98] * 1000:,.0f} ms (all runs were published at once: most of this is queueing)"
    )
