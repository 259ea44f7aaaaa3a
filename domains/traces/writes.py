"""Completes traces, many per statement."""

from collections.abc import Iterable, Sequence
from uuid import UUID

import msgspec
from sqlalchemy import Executable, update
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.database.statements import Compiled, columns_of, given_value, insert_many, unnest
from domains.result import DomainResult
from domains.run import CompletedRun, RunKey
from domains.traces.rules import STATUS_OF
from domains.traces.tables import traces

_COLUMNS = ("tenant_id", "trace_id", "run_id", "agent_id", "status", "started_at", "completed_at", "steps")
# Money as JSON numbers: jsonb keeps every digit.
_steps_json = msgspec.json.Encoder(decimal_format="number")

# No conflict target: neither another run's trace nor this run's other trace is changed.
_INSERT = Compiled(
    insert_many(traces, _COLUMNS).on_conflict_do_nothing().returning(traces.c.tenant_id, traces.c.run_id)
)


def _completion() -> Executable:
    """Complete running traces; a complete trace is never changed."""
    given = unnest(traces, _COLUMNS)
    changed = ("status", "started_at", "completed_at", "steps")
    return (
        update(traces)
        .values({name: given_value(traces, given, name) for name in changed})
        .where(*(traces.c[name] == given.c[name] for name in ("tenant_id", "trace_id", "run_id")))
        .where(traces.c.status == "running")
        .returning(traces.c.tenant_id, traces.c.run_id)
    )


_COMPLETE = Compiled(_completion())


async def complete(conn: AsyncConnection, runs: Sequence[CompletedRun]) -> dict[RunKey, DomainResult]:
    """Complete the trace of each of *runs*; runs without a trace id are skipped.

    One statement inserts missing traces; a second one completes existing ones.
    Safe to repeat: a complete trace is unchanged. Of two runs with one trace id the first owns the trace.
    """
    owners: dict[tuple[str, UUID], CompletedRun] = {}
    for run in runs:
        if run.trace_id is not None:
            owners.setdefault((run.tenant_id, run.trace_id), run)
    changed: dict[RunKey, bool] = {}
    if owners:
        found = await _INSERT.execute(conn, columns_of(_COLUMNS, _rows(owners.values())))
        changed = {RunKey(*row): True for row in found}
        rest = [run for run in owners.values() if run.key not in changed]
        if rest:
            found = await _COMPLETE.execute(conn, columns_of(_COLUMNS, _rows(rest)))
            changed |= {RunKey(*row): False for row in found}
    return {run.key: _result(run, changed.get(run.key)) for run in runs}


def _rows(runs: Iterable[CompletedRun]) -> Iterable[tuple[object, ...]]:
    for run in runs:
        steps = _steps_json.encode(run.steps).decode()
        status = STATUS_OF[run.status]
        yield (
            run.tenant_id, run.trace_id, run.run_id, run.agent_id, status, run.started_at, run.completed_at, steps,
        )  # fmt: skip


def _result(run: CompletedRun, inserted: bool | None) -> DomainResult:  # noqa: FBT001 - three results of one row
    if run.trace_id is None:
        return DomainResult("traces", "skipped", detail="the run has no trace id")
    if inserted is None:
        return DomainResult("traces", "kept", run.trace_id, "already complete, or owned by another run")
    return DomainResult("traces", "created" if inserted else "completed", run.trace_id)
