"""Traces, completed many at a time."""

from collections.abc import Iterable, Sequence
from uuid import UUID

import msgspec
from sqlalchemy import Boolean, Executable, exists, literal_column
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.columns import columns_of, given_rows
from domains.result import DomainResult
from domains.run import CompletedRun, RunKey
from domains.traces.rules import STATUS_OF
from domains.traces.tables import traces

_COLUMNS = ("tenant_id", "trace_id", "run_id", "agent_id", "status", "started_at", "completed_at", "steps")
# Money as a JSON number: jsonb keeps every digit of it.
_steps_json = msgspec.json.Encoder(decimal_format="number")


def _completion() -> Executable:
    """Insert what is missing, complete what is running, leave what is complete: the first truth wins.

    A trace that belongs to another run is not touched, and a run that has a trace under another id keeps it.
    """
    rows = given_rows(traces, _COLUMNS)
    given = rows.get_final_froms()[0]
    other = traces.alias("other")
    elsewhere = exists().where(
        other.c.tenant_id == given.c.tenant_id,
        other.c.run_id == given.c.run_id,
        other.c.trace_id != given.c.trace_id,
    )
    statement = insert(traces).from_select(list(_COLUMNS), rows.where(~elsewhere))
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=[traces.c.tenant_id, traces.c.trace_id],
        set_={name: new[name] for name in ("status", "started_at", "completed_at", "steps")},
        where=(traces.c.run_id == new.run_id) & (traces.c.status == "running"),
    ).returning(
        traces.c.tenant_id,
        traces.c.run_id,
        # A row that this statement inserted was never locked or deleted by anyone: its xmax is 0.
        literal_column("traces.xmax = 0", Boolean).label("inserted"),
    )


_COMPLETE = _completion()


async def complete(conn: AsyncConnection, runs: Sequence[CompletedRun]) -> dict[RunKey, DomainResult]:
    """Complete the trace of each of *runs*, in one statement; runs that were not traced are skipped.

    Safe to repeat: a complete trace is kept as it is. Of two runs that name one trace the first gets it.
    """
    owners: dict[tuple[str, UUID], CompletedRun] = {}
    for run in runs:
        if run.trace_id is not None:
            owners.setdefault((run.tenant_id, run.trace_id), run)
    changed: dict[RunKey, bool] = {}
    if owners:
        found = await conn.execute(_COMPLETE, columns_of(_COLUMNS, _rows(owners.values())))
        changed = {RunKey(row.tenant_id, row.run_id): row.inserted for row in found}
    return {run.key: _result(run, changed.get(run.key)) for run in runs}


def _rows(runs: Iterable[CompletedRun]) -> Iterable[tuple[object, ...]]:
    for run in runs:
        steps = _steps_json.encode(run.steps).decode()
        status = STATUS_OF[run.status]
        yield (
            run.tenant_id, run.trace_id, run.run_id, run.agent_id, status, run.started_at, run.completed_at, steps,
        )  # fmt: skip


def _result(run: CompletedRun, inserted: bool | None) -> DomainResult:  # noqa: FBT001 - three answers of one row
    if run.trace_id is None:
        return DomainResult("traces", "skipped", detail="the run was not traced")
    if inserted is None:
        return DomainResult("traces", "kept", run.trace_id, "complete already, or not this run's alone")
    return DomainResult("traces", "created" if inserted else "completed", run.trace_id)
