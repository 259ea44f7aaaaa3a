"""Reassembles stored runs as conditions saw them; read-only.

Not stored of a message are: the error message if the incident was suppressed, trace id and steps of a run without a
trace, the offsets of its times (read in UTC), and whether metadata numbers from 10^16 were fractions. Texts are read as
far as conditions see them. A trace that the runner completed itself keeps its own steps.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import ColumnElement, RowMapping, Text, cast, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from domains.database.statements import columns_of, unnest
from domains.policies.cel.visible import VISIBLE_MAX
from domains.run import CompletedRun, RunKey, Step, Usage
from domains.tables import incidents, policy_evaluations, prevention_records, run_completions, traces

_NO_TRACE = frozenset({"trace_id", "steps", "step_count"})
_NO_STEPS = frozenset({"steps", "step_count"})
_NO_INCIDENT = frozenset({"error_message"})

_metadata = msgspec.json.Decoder(dict[str, Any])
_steps = msgspec.json.Decoder(tuple[Step, ...])

# Keys are looked up by index: a hash join would read complete tables for each page.
_SETTINGS = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}


class StoredRun(NamedTuple):
    """A run, its fields that are not stored, and the policies' results at its close-out."""

    run: CompletedRun
    unknown: frozenset[str]
    outcome: str | None
    violations: Sequence[UUID]
    prevented_by: UUID | None
    shadow: Sequence[dict[str, Any]]


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open a read-only connection; its user ends the transaction after each statement.

    No transaction, and so no snapshot, outlives a statement: a snapshot keeps vacuum from the outbox.
    """
    async with engine.connect() as opened:
        conn = await opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        for name, value in _SETTINGS.items():
            await conn.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
        await conn.commit()
        try:
            yield conn
        finally:
            await conn.invalidate()  # its settings must not reach the pool


async def read_runs(conn: AsyncConnection, keys: Sequence[RunKey]) -> list[StoredRun]:
    """Return those of *keys* that are stored and closed out, in one statement, in any order."""
    rows = (await conn.execute(_STORED, columns_of(_KEYS, keys))).mappings().all()
    await conn.commit()
    return [_reassemble(row) for row in rows]


_KEYS = ("tenant_id", "run_id")
_PLAIN = (
    "tenant_id", "run_id", "status", "error_code", "cost_usd", "input_tokens", "output_tokens", "started_at",
    "completed_at", "is_synthetic", "run_ref", "cached_input_tokens", "parent_run_id", "session_id",
)  # fmt: skip
_TEXTS = ("agent_id", "model", "synthetic_scenario_id")


def _visible(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.left(column, VISIBLE_MAX + 1).label(getattr(column, "key", None))


def _stored() -> Any:  # noqa: ANN401 - a statement of many columns
    run, given = run_completions.c, unnest(run_completions, _KEYS)

    def same(table: Any, of: Any = run) -> Any:  # noqa: ANN401 - a table or an alias, and a condition
        return (table.c.tenant_id == of.tenant_id) & (table.c.run_id == of.run_id)

    return (
        select(
            *(run[name] for name in _PLAIN),
            *(_visible(run[name]) for name in _TEXTS),
            cast(run.metadata, Text).label("metadata"),
            incidents.c.incident_id,
            _visible(incidents.c.error_message),
            traces.c.trace_id,
            cast(traces.c.steps, Text).label("steps"),
            policy_evaluations.c.outcome,
            policy_evaluations.c.violations,
            policy_evaluations.c.shadow,
            prevention_records.c.policy_id,
        )
        .select_from(run_completions)
        .join(given, same(run_completions, given.c))
        .outerjoin(incidents, same(incidents))
        .outerjoin(prevention_records, same(prevention_records))
        .outerjoin(policy_evaluations, same(policy_evaluations))
        .outerjoin(traces, same(traces) & (traces.c.status != "running"))
        .where(run.committed_at.is_not(None))
    )


_STORED = _stored()


def _reassemble(row: RowMapping) -> StoredRun:
    unknown = frozenset[str]() if row["incident_id"] else _NO_INCIDENT
    steps: tuple[Step, ...] = ()
    if row["trace_id"] is None:
        unknown |= _NO_TRACE
    else:
        unknown |= _NO_STEPS
        # A trace that the runner completed may have other kinds of steps.
        with suppress(msgspec.ValidationError):
            steps, unknown = _steps.decode(row["steps"]), unknown - _NO_STEPS
    run = CompletedRun(
        schema_version=1,
        tenant_id=row["tenant_id"],
        run_id=row["run_id"],
        agent_id=row["agent_id"],
        status=row["status"],
        error_code=row["error_code"],
        error_message=row["error_message"],
        trace_id=row["trace_id"],
        started_at=row["started_at"],
        completed_at=row["completed_at"],
        usage=Usage(**{name: row[name] for name in Usage.__struct_fields__}),
        model=row["model"],
        steps=steps,
        is_synthetic=row["is_synthetic"],
        synthetic_scenario_id=row["synthetic_scenario_id"],
        metadata=_metadata.decode(row["metadata"]),
        run_ref=row["run_ref"],
        parent_run_id=row["parent_run_id"],
        session_id=row["session_id"],
    )
    violations = [UUID(found["policy_id"]) for found in row["violations"] or ()]
    return StoredRun(run, unknown, row["outcome"], violations, row["policy_id"], row["shadow"] or ())
