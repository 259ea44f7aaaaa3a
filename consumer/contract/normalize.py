"""Reads a run from any JSON object in which its identity and its outcome are clear.

Required fields decide: a fault in one refuses the message. Every other value is read in any spelling; a value that has
to be changed, truncated or dropped is recorded as an adjustment. Only messages that are not in the strict form
come here.
"""

from datetime import datetime
from typing import Any

from consumer.contract import scalars
from consumer.contract.adjustments import Adjustment, Adjustments
from consumer.contract.metadata import Bounded, clean_text
from consumer.contract.optional_fields import Fields, OptionalFields
from consumer.contract.refusals import EXPECTED, MessageRefusedError, Numeral, describe_value
from consumer.contract.scalars import INVALID
from consumer.contract.steps import steps_in
from domains.run import BIGINT_MAX, TEXT_MAX, CompletedRun, Usage

_STATUSES = ("succeeded", "failed", "halted", "aborted")


def normalize(document: Fields) -> tuple[CompletedRun, tuple[Adjustment, ...]]:
    """Return the run in *document* and what was adjusted; raise :class:`MessageRefusedError` for a required field."""
    _check_version(document)
    tenant_id = _tenant_id(document)
    run_id, run_ref = _run_id(document, tenant_id)
    status = scalars.folded(document.get("status"), _STATUSES)
    if not status:
        raise _refusal(document, "status")
    reader = OptionalFields(document, "", adjustments := Adjustments())
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
        steps=steps_in(document, adjustments),
        is_synthetic=_flag(reader, "is_synthetic"),
        synthetic_scenario_id=reader.text("synthetic_scenario_id", TEXT_MAX),
        metadata=_metadata(document, adjustments),
        parent_run_id=same_uuid(reader.text("parent_run_id", TEXT_MAX)),
        session_id=reader.text("session_id", TEXT_MAX),
    )
    return run, adjustments.listed()


def _refusal(document: Fields, name: str) -> MessageRefusedError:
    value = document.get(name)
    found = "missing" if value is None and name not in document else f"found {describe_value(value)}"
    return MessageRefusedError("schema_violation", f"{name}: {found}; expected {EXPECTED[name]}")


def _check_version(document: Fields) -> None:
    if document.get("schema_version") is None:
        raise _refusal(document, "schema_version")
    version = document["schema_version"]
    number = scalars.decimal_of(version) if not isinstance(version, str) or isinstance(version, Numeral) else INVALID
    if number != 1:
        raise MessageRefusedError(
            "unsupported_schema_version",
            f"schema_version: found {describe_value(version)}; expected {EXPECTED['schema_version']}",
        )


def _tenant_id(document: Fields) -> str:
    value = document.get("tenant_id")
    number = scalars.integer_of(value, BIGINT_MAX) if isinstance(value, int | Numeral) else INVALID
    text = value if number is INVALID else str(number)
    if not isinstance(text, str) or isinstance(text, Numeral) or not scalars.is_tenant_id(text):
        raise _refusal(document, "tenant_id")
    return text


def _run_id(document: Fields, tenant_id: str) -> tuple[Any, str | None]:
    value = document.get("run_id")
    # A fraction has many spellings, so it cannot be an id.
    text = INVALID if isinstance(value, Numeral) else scalars.text_of(value)
    found = scalars.run_id_of(tenant_id, text) if isinstance(text, str) else None
    if found is None:
        raise _refusal(document, "run_id")
    return found


def _time(document: Fields, name: str) -> datetime:
    time = scalars.time_of(document.get(name))
    if not isinstance(time, datetime):
        raise _refusal(document, name)
    return time


def _trace_id(reader: OptionalFields, tenant_id: str) -> Any:  # noqa: ANN401 - a UUID, or null
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


def _flag(reader: OptionalFields, name: str) -> bool:
    value = reader.fields.get(name)
    if value is not None and not isinstance(value, bool):
        reader.adjusted(name, False)
    return value is True


def _usage(document: Fields, adjustments: Adjustments) -> Usage:
    usage = document.get("usage")
    if not isinstance(usage, dict):
        if usage is not None:
            adjustments.add("usage", usage, None)
        return Usage()
    reader = OptionalFields(usage, "usage.", adjustments)
    return Usage(
        cost_usd=reader.cost(),
        input_tokens=reader.tokens("input_tokens"),
        output_tokens=reader.tokens("output_tokens"),
        cached_input_tokens=reader.tokens("cached_input_tokens"),
    )


def _metadata(document: Fields, adjustments: Adjustments) -> dict[str, Any]:
    metadata = document.get("metadata")
    if isinstance(metadata, dict):
        return Bounded(adjustments).copy(metadata)
    if metadata is not None:
        adjustments.add("metadata", metadata, None)
    return {}
