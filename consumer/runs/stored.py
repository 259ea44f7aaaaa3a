"""Reassembles stored runs as conditions saw them; read-only.

Not stored of a message are: the error message if the incident was suppressed, trace id and steps of a run without a
trace, the offsets of its times (read in UTC), and whether metadata numbers from 10^16 were fractions. Texts are read as
far as conditions see them. A trace that the runner completed itself keeps its own steps.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import monotonic
from typing import Any, NamedTuple, cast
from uuid import UUID

import asyncpg
import msgspec
from sqlalchemy import Select, Text, func, select, text
from sqlalchemy import cast as sql_cast
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.runs.pages import Received, Span, in_span
from domains.database.statements import columns_of, for_driver, unnest
from domains.policies.cel.visible import FIELDS, VISIBLE_MAX
from domains.run import CompletedRun, RunKey, Step, Usage
from domains.tables import incidents, policy_evaluations, prevention_records, run_completions, traces

_NO_TRACE = frozenset({"trace_id", "steps", "step_count"})
_NO_STEPS = frozenset({"steps", "step_count"})
_NO_INCIDENT = frozenset({"error_message"})

# Runs that are fetched at once: 50 MB if each has 1,000 steps.
_RUNS_A_FETCH = 500
# Seconds after which read_span() continues in another transaction: a snapshot keeps vacuum from the outbox.
TRANSACTION_SECONDS = 2.0

_metadata = msgspec.json.Decoder(dict[str, Any])
_steps = msgspec.json.Decoder(tuple[Step, ...])
_violations = msgspec.json.Decoder(list[dict[str, Any]])

# Keys are looked up by index: a hash join would read complete tables for each page.
_SETTINGS = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}

# A row of the statement of Columns.of().
StoredRow = Sequence[Any]


class StoredRun(NamedTuple):
    """A run, its fields that are not stored, and the policies' results at its close-out."""

    run: CompletedRun
    unknown: frozenset[str]
    outcome: str | None
    violations: Sequence[UUID]
    prevented_by: UUID | None


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open a read-only connection; its user ends the transactions: a snapshot keeps vacuum from the outbox."""
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
    return [_COMPLETE.run_of(row) for row in await read_rows(conn, keys, _COMPLETE)]


async def read_rows(conn: AsyncConnection, keys: Sequence[RunKey], columns: "Columns") -> Sequence[StoredRow]:
    """Return the rows of those of *keys* that are stored and closed out, in one statement, in any order."""
    statement = _BY_KEY if columns is _COMPLETE else columns.of(_by_key())
    rows: Sequence[StoredRow] = (await conn.execute(statement, columns_of(_KEYS, keys))).all()
    await conn.commit()
    return rows


async def read_span(
    conn: AsyncConnection, span: Span, tenant: str | None, columns: "Columns"
) -> AsyncIterator[list[StoredRow]]:
    """Yield the runs of *span*, the last received first, a few hundred rows at a time. Errors are asyncpg's."""
    driver = cast("asyncpg.Connection", (await conn.get_raw_connection()).driver_connection)
    while True:
        started = monotonic()
        sql, values = for_driver(columns.of(in_span(span, tenant)).order_by(*_PLACE))
        # SQLAlchemy's rows would take a third of the time.
        async with driver.transaction(isolation="repeatable_read", readonly=True):
            cursor = await driver.cursor(sql, *values)
            while rows := await cursor.fetch(_RUNS_A_FETCH):
                yield cast("list[StoredRow]", rows)
                if monotonic() - started >= TRANSACTION_SECONDS:
                    span = span._replace(before=Received(*rows[-1][:3]))
                    break
            else:
                return


_KEYS = ("tenant_id", "run_id")
_PLACE = [text(f"{name} DESC") for name in Received._fields]
# Fields of a run that are columns of run_completions, and those of them that are read as far as conditions see them.
_PLAIN = (
    "error_code", "started_at", "completed_at", "is_synthetic", "run_ref", "parent_run_id", "session_id", "agent_id",
    "model", "synthetic_scenario_id",
)  # fmt: skip
_CUT = {"agent_id", "model", "synthetic_scenario_id"}
_USAGE = Usage.__struct_fields__
# A run has both times, also where they are not read.
_NOT_READ = datetime(1970, 1, 1, tzinfo=UTC)
# The columns of every statement: the place of the run, and what its close-out found.
TENANT, RUN, STATUS, OUTCOME, VIOLATIONS, PREVENTED_BY = range(1, 7)
_ALWAYS = 7


class Columns:
    """The columns that some *fields* of a run are read from, and how a row of them becomes a run.

    The other fields of that run have their defaults, and are not among its unknown ones.
    """

    def __init__(self, fields: frozenset[str]) -> None:
        if "duration_ms" in fields:
            fields |= {"started_at", "completed_at"}
        self._plain = [name for name in _PLAIN if name in fields]
        self._usage = "usage" in fields
        self._metadata = "metadata" in fields
        self._message = "error_message" in fields
        self._trace = bool(fields & _NO_TRACE)
        names = [*self._plain, *(f"usage.{name}" for name in _USAGE if self._usage)]
        # The position of a field's value in a row, by its path.
        self.positions = {"tenant_id": TENANT, "status": STATUS}
        self.positions |= {name: number for number, name in enumerate(names, start=_ALWAYS)}
        self.metadata_at = _ALWAYS + len(names)

    def steps_of(self, row: StoredRow) -> tuple[Step, ...] | None:
        """Return the steps in *row*; null if they are not stored, or of another kind."""
        return None if row[-1] is None else _steps_in(row[-1])

    def of(self, runs: Select[Any]) -> Select[Any]:
        """Return the statement for the rows of ``run_completions`` that *runs* selects."""
        run = run_completions.c
        names = [*Received._fields, "status", *self._plain, *(_USAGE if self._usage else ())]
        cut = [func.left(run[name], VISIBLE_MAX + 1).label(name) if name in _CUT else run[name] for name in names]
        more = [sql_cast(run.metadata, Text).label("metadata")] if self._metadata else []
        found = runs.with_only_columns(*cut, *more).subquery("run")

        def same(table: Any) -> Any:  # noqa: ANN401 - a table, and a condition
            return (table.c.tenant_id == found.c.tenant_id) & (table.c.run_id == found.c.run_id)

        evaluated, prevented = policy_evaluations.c, prevention_records.c
        always = [*list(found.c)[:4], evaluated.outcome, sql_cast(evaluated.violations, Text), prevented.policy_id]
        query = (
            select(*always, *list(found.c)[4:])
            .select_from(found)
            .outerjoin(prevention_records, same(prevention_records))
            .outerjoin(policy_evaluations, same(policy_evaluations))
        )
        if self._message:
            message = func.left(incidents.c.error_message, VISIBLE_MAX + 1)
            query = query.add_columns(incidents.c.incident_id, message).outerjoin(incidents, same(incidents))
        if self._trace:
            query = query.add_columns(traces.c.trace_id, sql_cast(traces.c.steps, Text))
            query = query.outerjoin(traces, same(traces) & (traces.c.status != "running"))
        return query

    def run_of(self, row: StoredRow) -> StoredRun:
        """Return the run in *row*."""
        _, tenant_id, run_id, status, outcome, violations, prevented_by = row[:_ALWAYS]
        rest = iter(row[_ALWAYS:])
        fields: dict[str, Any] = {"started_at": _NOT_READ, "completed_at": _NOT_READ}
        fields.update(zip(self._plain, rest, strict=False))
        unknown = frozenset[str]()
        if self._usage:
            fields["usage"] = Usage(**dict(zip(_USAGE, rest, strict=False)))
        if self._metadata:
            fields["metadata"] = _metadata.decode(next(rest))
        if self._message:
            unknown = _NO_INCIDENT if next(rest) is None else unknown
            fields["error_message"] = next(rest)
        if self._trace:
            fields["trace_id"], text = rest
            steps = None if text is None else _steps_in(text)
            unknown |= _NO_TRACE if text is None else _NO_STEPS if steps is None else frozenset()
            fields["steps"] = steps or ()
        run = CompletedRun(schema_version=1, tenant_id=tenant_id, run_id=run_id, status=status, **fields)
        return StoredRun(run, unknown, outcome, violations_in(violations), prevented_by)


def decoded_metadata(text: str) -> dict[str, Any]:
    """Return the metadata in the *text* of the column."""
    return _metadata.decode(text)


def violations_in(text: str | None) -> list[UUID]:
    """Return the policies that flagged a run, from the text of the column."""
    return [] if text is None or text == "[]" else [UUID(one["policy_id"]) for one in _violations.decode(text)]


def _steps_in(text: str) -> tuple[Step, ...] | None:
    try:
        return _steps.decode(text)
    except msgspec.ValidationError:  # a trace that the runner completed may have other kinds of steps
        return None


def _by_key() -> Select[Any]:
    given = unnest(run_completions, _KEYS)
    run = run_completions.c
    return (
        select(run.tenant_id)
        .select_from(run_completions)
        .join(given, (run.tenant_id == given.c.tenant_id) & (run.run_id == given.c.run_id))
        .where(run.committed_at.is_not(None))
    )


_COMPLETE = Columns(FIELDS)
_BY_KEY = _COMPLETE.of(_by_key())
