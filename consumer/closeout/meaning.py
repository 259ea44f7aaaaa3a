"""Compares a message with its stored run: two messages with the same stored meaning are duplicates.

Differences in key order, white space, the spelling of numbers, times and UUIDs, null or absent, and unknown fields do
not count. Values that are not stored are not compared: the error message of a suppressed incident, the steps of a run
without a trace.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Text, cast, select
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.contract.refusals import describe_value
from domains.completions import run_completions
from domains.database.statements import Compiled, columns_of, of_given_tenants, unnest
from domains.incidents.tables import incidents
from domains.run import CompletedRun, RunKey, Step
from domains.traces.tables import traces

_IDENTITY = frozenset({"schema_version", "tenant_id", "run_id", "run_ref"})
_STEP_FIELDS = tuple(field.name for field in msgspec.structs.fields(Step))
_KEYS = ("tenant_id", "run_id")
_PLAIN = (
    "status", "agent_id", "error_code", "started_at", "completed_at", "model", "is_synthetic", "synthetic_scenario_id",
    "parent_run_id", "session_id",
)  # fmt: skip
_USAGE = ("cost_usd", "input_tokens", "output_tokens", "cached_input_tokens")


class Meaning(NamedTuple):
    """The known values of a run by field, such as ``usage.cost_usd``. A field that is missing here is unknown."""

    values: Mapping[str, Any]

    def difference(self, run: CompletedRun) -> str | None:
        """Return the first field in which *run* differs, with both values; ``None`` if the meaning is the same."""
        for name, found in _values(run):
            if name in self.values and (differing := _difference(name, self.values[name], found)):
                return differing
        return None


def meaning_of(run: CompletedRun) -> Meaning:
    """Return the meaning of *run*, with every field known."""
    return Meaning(dict(_values(run)))


def _values(run: CompletedRun) -> Iterator[tuple[str, Any]]:
    for name in ("status", *(name for name in CompletedRun.__struct_fields__ if name != "status")):
        if name == "usage":
            yield from ((f"usage.{part}", getattr(run.usage, part)) for part in _USAGE)
        elif name not in _IDENTITY:
            yield name, getattr(run, name)


def _difference(path: str, stored: Any, found: Any) -> str | None:  # noqa: ANN401 - values of any field
    if path == "steps":
        return _step_difference(stored, found)
    if _is_same(stored, found):
        return None
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in sorted({*stored, *found}):
            if not _is_same(stored.get(key, msgspec.UNSET), found.get(key, msgspec.UNSET)):
                return _describe(f"{path}.{key[:100]}", stored.get(key, msgspec.UNSET), found.get(key, msgspec.UNSET))
    return _describe(path, stored, found)


def _step_difference(stored: Sequence[Step], found: Sequence[Step]) -> str | None:
    for position, (one, other) in enumerate(zip(stored, found, strict=False)):
        for name in _STEP_FIELDS:
            if not _is_same(getattr(one, name), getattr(other, name)):
                return _describe(f"steps[{position}].{name}", getattr(one, name), getattr(other, name))
    if len(stored) != len(found):
        return f"steps: stored {len(stored)}, found {len(found)}"
    return None


def _is_same(one: Any, other: Any) -> bool:  # noqa: ANN401 - values of any field
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other  # to Python, true equals 1
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def _describe(path: str, stored: object, found: object) -> str:
    return f"{path}: stored {_text(stored)}, found {_text(found)}"


def _text(value: object) -> str:
    if value is msgspec.UNSET:
        return "nothing"
    if isinstance(value, Decimal):
        return str(value)
    return describe_value(value if isinstance(value, str | int | float | dict | list | None) else str(value))


def _stored_statement() -> Compiled:
    run, given = run_completions.c, unnest(run_completions, _KEYS)

    def same(table: Any, of: Any = run) -> Any:  # noqa: ANN401 - a table, and a condition
        return (table.c.tenant_id == of.tenant_id) & (table.c.run_id == of.run_id)

    statement = (
        select(
            *(run[name] for name in (*_KEYS, *_PLAIN, *_USAGE)),
            cast(run.metadata, Text).label("metadata"),
            incidents.c.incident_id,
            incidents.c.error_message,
            traces.c.trace_id,
            cast(traces.c.steps, Text).label("steps"),
        )
        .select_from(run_completions)
        .join(given, same(run_completions, given.c))
        .outerjoin(incidents, same(incidents))
        .outerjoin(traces, same(traces) & (traces.c.status != "running"))
    )
    return Compiled(statement, on_citus=statement.where(of_given_tenants(run_completions)))


_STORED = _stored_statement()
_metadata = msgspec.json.Decoder(dict[str, Any])
_steps = msgspec.json.Decoder(tuple[Step, ...])


async def stored_meanings(conn: AsyncConnection, keys: Sequence[RunKey]) -> dict[RunKey, Meaning]:
    """Return the stored meaning of each of *keys*."""
    found: dict[RunKey, Meaning] = {}
    for tenant_id, run_id, *rest in await _STORED.execute(conn, columns_of(_KEYS, keys)):
        found[RunKey(tenant_id, run_id)] = _meaning(rest)
    return found


def _meaning(row: Sequence[Any]) -> Meaning:
    values: dict[str, Any] = dict(zip(_PLAIN, row, strict=False))
    rest = row[len(_PLAIN) :]
    values |= {f"usage.{name}": value for name, value in zip(_USAGE, rest, strict=False)}
    metadata, incident_id, error_message, trace_id, steps = rest[len(_USAGE) :]
    values["metadata"] = _metadata.decode(metadata)
    if incident_id is not None:
        values["error_message"] = error_message
    if trace_id is not None:
        values["trace_id"] = UUID(str(trace_id))
        with suppress(msgspec.ValidationError):  # a trace that the runner completed may have other kinds of steps
            values["steps"] = _steps.decode(steps)
    return Meaning(values)
