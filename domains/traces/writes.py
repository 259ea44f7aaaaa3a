"""Completes traces, many per statement."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Executable, Select, Update, and_, select, update
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.database.statements import (
    Compiled,
    columns_of,
    given_value,
    insert_many,
    insert_row,
    of_given_tenants,
    unnest,
)
from domains.result import DomainResult
from domains.run import CompletedRun, RunKey
from domains.traces.rules import STATUS_OF
from domains.traces.tables import traces

_COLUMNS = ("tenant_id", "trace_id", "run_id", "agent_id", "status", "started_at", "completed_at", "steps")
# Money as JSON numbers: jsonb keeps every digit.
_steps_json = msgspec.json.Encoder(decimal_format="number")


# A trace belongs to its run, and the run is its key: another run's row cannot conflict with it, even if it names the
# same trace.
def _insert(statement: Insert) -> Executable:
    key = (traces.c.tenant_id, traces.c.run_id, traces.c.trace_id)
    return statement.on_conflict_do_nothing().returning(*key)


_INSERT = Compiled(_insert(insert_many(traces, _COLUMNS)), on_citus=_insert(insert_row(traces, _COLUMNS)))


def _completion() -> Update:
    """Complete running traces; a complete trace is never changed."""
    given = unnest(traces, _COLUMNS)
    changed = ("status", "started_at", "completed_at", "steps")
    return (
        update(traces)
        .values({name: given_value(traces, given, name) for name in changed})
        .where(*(traces.c[name] == given.c[name] for name in ("tenant_id", "run_id")))
        .where(traces.c.status == "running")
        .returning(traces.c.tenant_id, traces.c.run_id, traces.c.trace_id)
    )


def _completed() -> Select[Any]:
    given = unnest(traces, _COLUMNS)
    same = [traces.c[name] == given.c[name] for name in ("tenant_id", "run_id")]
    return select(traces.c.tenant_id, traces.c.run_id, traces.c.trace_id).join_from(traces, given, and_(*same))


_COMPLETE = Compiled(_completion(), on_citus=_completion().where(of_given_tenants(traces)))
_COMPLETED = Compiled(_completed(), on_citus=_completed().where(of_given_tenants(traces)))


_Action = Literal["created", "completed", "kept"]
_WRITES: tuple[tuple[Compiled, _Action], ...] = ((_INSERT, "created"), (_COMPLETE, "completed"), (_COMPLETED, "kept"))


async def complete(conn: AsyncConnection, runs: Sequence[CompletedRun]) -> dict[RunKey, DomainResult]:
    """Complete the trace of each of *runs*, whose keys must differ; runs without a trace id are skipped.

    One statement inserts missing traces; a second one completes those that the runner inserted as running, under the
    trace id that it gave them; a third one reads what is left. A result's ``record_id`` is the stored trace id.
    Safe to repeat: a complete trace is unchanged.
    """
    traced = {run.key: run for run in runs if run.trace_id is not None}
    results: dict[RunKey, DomainResult] = {}
    for statement, action in _WRITES:
        rest = [run for key, run in traced.items() if key not in results]
        if not rest:
            break
        found = await statement.execute(conn, columns_of(_COLUMNS, _rows(rest)))
        detail = "already complete" if action == "kept" else ""
        for tenant_id, run_id, trace_id in found:
            results[RunKey(tenant_id, run_id)] = DomainResult("traces", action, trace_id, detail)
    skipped = DomainResult("traces", "skipped", detail="the run has no trace id")
    return {run.key: results.get(run.key, skipped) for run in runs}


def _rows(runs: Iterable[CompletedRun]) -> Iterable[tuple[object, ...]]:
    for run in runs:
        steps = _steps_json.encode(run.steps).decode()
        status = STATUS_OF[run.status]
        yield (
            run.tenant_id, run.trace_id, run.run_id, run.agent_id, status, run.started_at, run.completed_at, steps,
        )  # fmt: skip
