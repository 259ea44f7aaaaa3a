"""Reads a run from any JSON object in which its identity and its outcome are clear.

Required fields decide: a fault in one refuses the message. Every other value is read in any spelling; a value that has
to be changed, cut or dropped is recorded as an adjustment. Only messages that are not in the strict form come here.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from consumer.contract import scalars
from consumer.contract.adjustments import Adjustment, Adjustments
from consumer.contract.metadata import Bounded, clean_text
from consumer.contract.refusals import EXPECTED, MessageRefusedError, Numeral, describe_value
from consumer.contract.scalars import INVALID
from domains.run import BIGINT_MAX, STEPS_MAX, TEXT_MAX, CompletedRun, Step, Usage

_STATUSES = ("succeeded", "failed", "halted", "aborted")
_STEP_STATUSES = ("succeeded", "failed", "skipped", "unknown")
_INDEX_MAX = 2**31 - 1

_Fields = Mapping[str, Any]


def normalize(document: _Fields) -> tuple[CompletedRun, tuple[Adjustment, ...]]:
    """Return the run in *document* and what was adjusted; raise :class:`MessageRefusedError` for a required field."""
    _check_version(document)
    tenant_id = _tenant_id(document)
    run_id, run_ref = _run_id(document, tenant_id)
    status = scalars.folded(document.get("status"), _STATUSES)
    if not status:
        raise _refusal(document, "status")
    reader = _Optional(document, "", adjustments := Adjustments())
    run = CompletedRun(
        schema_version=1,
        tenant_id=tenant_id,
        run_id=run_id,
        run_ref=run_ref,
        status=status,  # type: ignore[arg-type]
        started_at=_time(document, "started_at"),
        completed_at=_time(document, "completed_at"),
        agent_id=reader.text("agent_id", TEXT_MAX),
        error_code=reader.error_code(),
        error_message=reader.text("error_message"),
        trace_id=_trace_id(reader, tenant_id),
        usage=_usage(document, adjustments),
        model=reader.text("model", TEXT_MAX),
        steps=_steps(document, adjustments),
        is_synthetic=_flag(reader, "is_synthetic"),
        synthetic_scenario_id=reader.text("synthetic_scenario_id", TEXT_MAX),
        metadata=_metadata(document, adjustments),
        parent_run_id=same_uuid(reader.text("parent_run_id", TEXT_MAX)),
        session_id=reader.text("session_id", TEXT_MAX),
    )
    return run, adjustments.listed()


def _refusal(document: _Fields, name: str) -> MessageRefusedError:
    value = document.get(name)
    found = "missing" if value is None and name not in document else f"found {describe_value(value)}"
    return MessageRefusedError("schema_violation", f"{name}: {found}; expected {EXPECTED[name]}")


def _check_version(document: _Fields) -> None:
    if document.get("schema_version") is None:
        raise _refusal(document, "schema_version")
    version = document["schema_version"]
    number = scalars.decimal_of(version) if not isinstance(version, str) or isinstance(version, Numeral) else INVALID
    if number != 1:
        raise MessageRefusedError(
            "unsupported_schema_version",
            f"schema_version: found {describe_value(version)}; expected {EXPECTED['schema_version']}",
        )


def _tenant_id(document: _Fields) -> str:
    value = document.get("tenant_id")
    number = scalars.integer_of(value, BIGINT_MAX) if isinstance(value, int | Numeral) else INVALID
    text = value if number is INVALID else str(number)
    if not isinstance(text, str) or isinstance(text, Numeral) or not scalars.is_tenant_id(text):
        raise _refusal(document, "tenant_id")
    return text


def _run_id(document: _Fields, tenant_id: str) -> tuple[Any, str | None]:
    value = document.get("run_id")
    text = INVALID if isinstance(value, Numeral) else scalars.text_of(value)  # of a fraction there are many spellings
    found = scalars.run_id_of(tenant_id, text) if isinstance(text, str) else None
    if found is None:
        raise _refusal(document, "run_id")
    return found


def _time(document: _Fields, name: str) -> datetime:
    time = scalars.time_of(document.get(name))
    if not isinstance(time, datetime):
        raise _refusal(document, name)
    return time


class _Optional:
    """Reads the optional fields of one object; a value that cannot be read becomes null and is recorded."""

    def __init__(self, fields: _Fields, path: str, adjustments: Adjustments) -> None:
        self.fields = fields
        self._path = path
        self._adjustments = adjustments

    def adjusted(self, name: str, stored: object) -> None:
        self._adjustments.add(self._path + name, self.fields.get(name), stored)

    def read(self, name: str, convert: Callable[[Any], object]) -> Any:  # noqa: ANN401 - what *convert* returns
        """Return the converted value of *name*; null if it is missing, null or invalid."""
        value = self.fields.get(name)
        if value is None:
            return None
        found = convert(value)
        if found is INVALID:
            self.adjusted(name, None)
            return None
        return found

    def text(self, name: str, most: int | None = None) -> str | None:
        text: str | None = self.read(name, scalars.text_of)
        if text is None:
            return None
        kept = clean_text(text)[:most]
        if kept != text:
            self.adjusted(name, kept)
        return kept

    def error_code(self) -> str | None:
        text: str | None = self.read("error_code", scalars.text_of)
        if text is None:
            return None
        code = scalars.error_code_of(text)
        if code != text:
            self.adjusted("error_code", code)
        return code

    def tokens(self, name: str) -> int | None:
        found: int | None = self.read(name, lambda value: scalars.integer_of(value, BIGINT_MAX))
        return found

    def cost(self) -> Decimal | None:
        amount: Decimal | None = self.read("cost_usd", scalars.money_of)
        return amount


def _trace_id(reader: _Optional, tenant_id: str) -> Any:  # noqa: ANN401 - a UUID, or null
    text = reader.read("trace_id", scalars.text_of)
    if not text:
        if text is not None:
            reader.adjusted("trace_id", None)
        return None
    found = scalars.uuid_of(text)
    if found is None:
        found = scalars.derived_id(tenant_id, clean_text(text))
        reader.adjusted("trace_id", str(found))  # the text is stored nowhere else
    return found


def same_uuid(text: str | None) -> str | None:
    """Return a UUID in its usual spelling, so that it matches the parent's; another text as it is."""
    found = scalars.uuid_of(text) if text else None
    return str(found) if found else text


def _flag(reader: _Optional, name: str) -> bool:
    value = reader.fields.get(name)
    if value is not None and not isinstance(value, bool):
        reader.adjusted(name, False)
    return value is True


def _usage(document: _Fields, adjustments: Adjustments) -> Usage:
    usage = document.get("usage")
    if not isinstance(usage, dict):
        if usage is not None:
            adjustments.add("usage", usage, None)
        return Usage()
    reader = _Optional(usage, "usage.", adjustments)
    return Usage(
        cost_usd=reader.cost(),
        input_tokens=reader.tokens("input_tokens"),
        output_tokens=reader.tokens("output_tokens"),
        cached_input_tokens=reader.tokens("cached_input_tokens"),
    )


def _metadata(document: _Fields, adjustments: Adjustments) -> dict[str, Any]:
    metadata = document.get("metadata")
    if isinstance(metadata, dict):
        return Bounded(adjustments).copy(metadata)
    if metadata is not None:
        adjustments.add("metadata", metadata, None)
    return {}


def _steps(document: _Fields, adjustments: Adjustments) -> tuple[Step, ...]:
    steps = document.get("steps")
    if not isinstance(steps, list):
        if steps is not None:
            adjustments.add("steps", steps, None)
        return ()
    if len(steps) > STEPS_MAX:
        adjustments.add("steps", f"{len(steps)} steps", f"the first {STEPS_MAX}")
    indexes = _Indexes(len(steps))
    kept = []
    for position, step in enumerate(steps[:STEPS_MAX]):
        if isinstance(step, dict):
            kept.append(_step(step, position, indexes, adjustments))
        else:
            adjustments.add(f"steps[{position}]", step, None)
    return tuple(kept)


def _step(step: _Fields, position: int, indexes: "_Indexes", adjustments: Adjustments) -> Step:
    reader = _Optional(step, f"steps[{position}].", adjustments)
    status = scalars.folded(step.get("status"), _STEP_STATUSES) or "unknown"
    if status == "unknown" and step.get("status") is not None and not scalars.folded(step["status"], ("unknown",)):
        reader.adjusted("status", status)
    return Step(
        index=indexes.of(reader, position),
        skill=reader.text("skill"),
        status=status,  # type: ignore[arg-type]
        duration_ms=reader.read("duration_ms", lambda value: scalars.milliseconds_of(value, BIGINT_MAX)),
        cost_usd=reader.cost(),
        error_code=reader.error_code(),
        kind=reader.text("kind", TEXT_MAX),
        started_at=reader.read("started_at", scalars.time_of),
        model=reader.text("model", TEXT_MAX),
        input_tokens=reader.tokens("input_tokens"),
        output_tokens=reader.tokens("output_tokens"),
        error_message=reader.text("error_message"),
    )


class _Indexes:
    """Gives each step an index that is unique in the run."""

    def __init__(self, number: int) -> None:
        self._taken: set[int] = set()
        self._spare = number

    def of(self, reader: _Optional, position: int) -> int:
        """Return the step's own index; if it is missing or repeated its position, or one behind all positions."""
        found = scalars.integer_of(reader.fields.get("index"), _INDEX_MAX)
        index = found if isinstance(found, int) and found not in self._taken else position
        while index in self._taken:
            index = self._spare
            self._spare += 1
        self._taken.add(index)
        if found is INVALID and reader.fields.get("index") is not None:
            reader.adjusted("index", index)
        return index
