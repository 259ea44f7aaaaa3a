"""Evaluates policies of a file on stored runs, and compares the results with the enforced policies. Read-only.

The runs are read in spans of a few thousand, by one process per core; each process has a few hundred in memory: the
number of runs costs time, not memory.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.policy_analysis.evaluation import Evaluation, InForce, Name, Results
from consumer.policy_analysis.processes import Processes
from consumer.policy_analysis.tally import EXAMPLES, Tally, example_of
from consumer.runs.pages import Span, estimate, sample, spans
from consumer.runs.stored import read_rows, read_runs, reading
from consumer.wording import Progress
from domains.policies.cel.conditions import Condition
from domains.policies.cel.visible import Visible
from domains.policies.explain import ask
from domains.policies.files import PolicyDraft
from domains.policies.tables import policies
from domains.run import RunKey

# A span takes a process about half a second.
_RUNS_A_SPAN = 10_000
# Runs of a sample that are read at once: 50 MB if each has 1,000 steps.
_RUNS_A_STATEMENT = 500
# Below this number of runs, starting processes takes longer than it saves.
_RUNS_FOR_PROCESSES = 30_000


@dataclass(slots=True)
class Backtest:
    """The result of a backtest."""

    since: datetime
    until: datetime
    tallies: list[Tally]
    runs: int = 0
    in_force: InForce = field(default_factory=InForce)
    # The estimated number of runs of which these are a random sample; null: these are all.
    sample_of: int | None = None


async def backtest(
    engine: AsyncEngine,
    drafts: Sequence[PolicyDraft],
    *,
    since: datetime,
    until: datetime,
    tenant: str | None = None,
    limit_examples: int = 3,
    progress: Progress = lambda _done, _of: None,
    processes: Processes | None = None,
    sample_size: int | None = None,
) -> Backtest:
    """Evaluate *drafts* on the runs received from *since* to *until*; *progress* gets done and estimated total.

    Reads only, in short transactions; works with a role that has only SELECT, and on a standby. *processes* evaluate if
    there are many runs; otherwise, and without them, this process does. With *sample_size*, only that many random runs
    are read.
    """
    enabled = [draft for draft in drafts if draft.enabled]
    async with reading(engine) as conn:
        names, known = await _stored_names(conn)
        evaluation = Evaluation(enabled, names, tenant=tenant, limit=limit_examples)
        sample_of: int | None = None
        about = await estimate(conn, since=since, until=until, tenant=tenant)
        found = spans(conn, since=since, until=until, tenant=tenant, size=_RUNS_A_SPAN)
        if sample_size is not None:
            keys, is_all = await sample(conn, sample_size, among=about, since=since, until=until, tenant=tenant)
            parts = _sampled(conn, evaluation, keys)
            sample_of, about = (None if is_all else about), len(keys)
        elif processes is not None and about >= _RUNS_FOR_PROCESSES:
            parts = processes.evaluate(evaluation, found)
        else:
            parts = _evaluated(conn, evaluation, found)
        results = evaluation.none()
        async for part in parts:
            results.add(part, limit_examples)
            progress(results.runs, max(about, results.runs))
        tallies = [
            Tally(draft, Condition(draft.condition), (draft.tenant_id, draft.name) in known, hits.tenants)
            for draft, hits in zip(enabled, results.policies, strict=True)
        ]
        for tally, hits in zip(tallies, results.policies, strict=True):
            for kind in EXAMPLES:
                await _put_examples(conn, tally, kind, hits.examples[kind])
    return Backtest(since, until, tallies, results.runs, results.in_force, sample_of)


async def _evaluated(
    conn: AsyncConnection, evaluation: Evaluation, found: AsyncIterator[Span]
) -> AsyncIterator[Results]:
    async for span in found:
        yield await evaluation.of_span(conn, span)


async def _sampled(conn: AsyncConnection, evaluation: Evaluation, keys: Sequence[RunKey]) -> AsyncIterator[Results]:
    for start in range(0, len(keys), _RUNS_A_STATEMENT):
        results = evaluation.none()
        evaluation.add(await read_rows(conn, keys[start : start + _RUNS_A_STATEMENT], evaluation.columns), results)
        yield results


async def _stored_names(conn: AsyncConnection) -> tuple[dict[UUID, Name], set[Name]]:
    """Map policy version ids to (tenant, name); also return the names ever enforced."""
    row = policies.c
    rows = (await conn.execute(select(row.policy_id, row.tenant_id, row.name, row.shadow))).all()
    await conn.commit()
    names = {one.policy_id: (one.tenant_id, one.name) for one in rows}
    return names, {(one.tenant_id, one.name) for one in rows if one.shadow is None}


async def _put_examples(conn: AsyncConnection, tally: Tally, kind: str, keys: list[RunKey]) -> None:
    """Read the runs of *keys* again, with all their fields; one that was deleted meanwhile is omitted."""
    stored = {one.run.key: one for one in await read_runs(conn, keys)} if keys else {}
    for key in keys:
        if one := stored.get(key):
            visible = Visible(one.run, unknown=one.unknown)
            error = ask(tally.condition, visible).error
            tally.examples[kind].append(example_of(one, tally.condition, visible, error))
