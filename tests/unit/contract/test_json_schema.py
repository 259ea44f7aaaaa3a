"""The printed documents match the code."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, get_args
from uuid import UUID, uuid4

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from consumer.cli import app
from consumer.contract.asyncapi import asyncapi
from consumer.contract.events import EventType, events_for
from consumer.contract.json_schema import events_schema, run_completed_schema
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import decode
from consumer.contract.trace_context import TraceContext
from domains.incidents.rules import finding_for
from domains.policies.rules import PolicySet, evaluate
from domains.run import CompletedRun
from tests.support import run_messages as runs
from tests.support.schema_documents import documents

RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
# Not in the strict form. The decoder refuses those of required fields, and adjusts or reads the others.
NOT_STRICT = [
    {"tenant_id": ...},
    {"tenant_id": "no spaces"},
    {"tenant_id": "x\n"},
    {"tenant_id": "x" * 129},
    {"schema_version": 2},
    {"run_id": 5},
    {"run_id": "not-a-UUID"},
    {"trace_id": "not a UUID"},
    {"agent_id": 5},
    {"agent_id": "a" * 1_025},
    {"agent_id": "a\x00"},
    {"status": "done"},
    {"error_code": "lower"},
    {"error_code": "X\n"},
    {"error_code": "X" * 65},
    {"started_at": 5},
    {"started_at": "2026-11-01T12:00:00"},
    {"started_at": "2026-11-01"},
    {"started_at": "2026-11-01T12:00Z"},
    {"started_at": "2026-13-01T12:00:00Z"},
    {"started_at": "2026-02-30T12:00:00Z"},
    {"started_at": "2026-11-01T24:00:00Z"},
    {"started_at": "2026-11-01T12:00:00+24:00"},
    {"started_at": "0000-11-01T12:00:00Z"},
    {"started_at": "1777777777"},
    {"usage": {"cost_usd": -1}},
    {"usage": {"cost_usd": "-1"}},
    {"usage": {"cost_usd": "a lot"}},
    {"usage": {"cost_usd": "NaN"}},
    {"usage": {"cost_usd": True}},
    {"usage": {"cost_usd": 10**12}},
    {"usage": {"cost_usd": "1000000000000"}},
    {"usage": {"input_tokens": 1.5}},
    {"usage": {"input_tokens": "1"}},
    {"usage": {"input_tokens": -1}},
    {"usage": {"input_tokens": 2**63}},
    {"steps": [{"index": 0}]},
    {"steps": [{"index": 0, "status": "halted"}]},
    {"steps": [{"index": 2**31, "status": "failed"}]},
    {"steps": [{"index": -1, "status": "failed"}]},
    {"steps": [{"index": n, "status": "failed"} for n in range(10_001)]},
    {"metadata": {"a": []}},
    {"metadata": {"a": "\x00"}},
    {"metadata": {"\x00": 1}},
    {"metadata": {str(n): n for n in range(1_001)}},
]
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1.0, 1.5, 2**63, "", "1", "FAILED", "X\n", "\x00", "\ud800", "😀", "x" * 2_000, RUN_ID.upper(),
    f"{{{RUN_ID}}}", "2016-12-31T23:59:60Z", [], [{}], [{"index": 5}] * 3, {}, {"a": 1}, {"cost_usd": "1e-50"},
    {"input_tokens": "7", "cost_usd": -1},
    [{"status": "odd", "duration_ms": "5.5", "started_at": "2016-12-31T23:59:60Z"}],
]  # fmt: skip
ACCEPTED = [
    {},
    {"usage": {"cost_usd": "0.01"}},
    {"usage": {"cost_usd": "1E-5"}},
    {"usage": {"cost_usd": None}},
    {"usage": {"cost_usd": 999_999_999_999.99}},
    {"started_at": "2026-11-01t12:00:00.123456789z"},
    {"completed_at": "2026-11-01T23:59:59-00:30"},
    {"run_id": "0193AAAA-BBBB-7CCC-8DDD-EEEEFFFF0000"},
    {"trace_id": None, "agent_id": ..., "steps": ..., "metadata": ..., "usage": ...},
    {"unknown": {"field": [1]}},
    {"usage": None, "steps": None, "metadata": None, "is_synthetic": None},
    {"schema_version": 1.0, "usage": {"input_tokens": 1200.0}},
    {"completed_at": "2024-02-29T00:00:00Z"},
    {"completed_at": "2000-02-29T00:00:00Z"},
    {"steps": [{"index": 0, "status": "failed", "duration_ms": 1.5}, {"index": 0, "status": "failed"}]},
]


def test_the_schemas_are_valid_json_schema_2020_12() -> None:
    for schema in (run_completed_schema(), events_schema()):
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("changes", NOT_STRICT, ids=lambda value: str(value)[:50])
def test_the_schema_rejects_what_is_not_in_the_strict_form(changes: dict[str, Any]) -> None:
    fields = runs.message(**changes)
    assert not _validator(run_completed_schema()).is_valid(fields)
    # Many validators treat a format as an annotation.
    assert not Draft202012Validator(run_completed_schema()).is_valid(fields)


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_a_message_that_matches_the_schema_is_accepted_as_it_is(changes: dict[str, Any]) -> None:
    fields = runs.message(**changes)
    _validator(run_completed_schema()).validate(fields)
    assert decode(json.dumps(fields).encode(), max_bytes=1_000_000).adjustments == ()


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(documents(run_completed_schema()))
def test_every_document_made_from_the_schema_is_accepted_without_adjustments(document: dict[str, Any]) -> None:
    _validator(run_completed_schema()).validate(document)
    decoded = decode(json.dumps(document).encode(), max_bytes=10_000_000)
    assert decoded.adjustments == ()
    assert strict_form(decoded.run) == strict_form(decode(strict_form(decoded.run), max_bytes=10_000_000).run)


@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(list(runs.message())), st.sampled_from(ODD_VALUES)), max_size=3))
def test_what_is_stored_of_an_accepted_message_matches_the_schema(changes: list[tuple[str, Any]]) -> None:
    fields = runs.message(**dict(changes))
    try:
        run = decode(json.dumps(fields).encode(), max_bytes=1_000_000).run
    except MessageRefusedError:
        return
    _validator(run_completed_schema()).validate(json.loads(strict_form(run)))


def strict_form(run: CompletedRun) -> bytes:
    """Return *run* as a message in the strict form."""
    fields = msgspec.to_builtins(run)
    del fields["run_ref"]
    return msgspec.json.encode(fields)


@pytest.mark.parametrize("trace", [None, TraceContext(TRACEPARENT), TraceContext(TRACEPARENT, "a=1,b=2")])
@pytest.mark.parametrize("suppressed_by", [None, uuid4()])
def test_real_events_match_the_schema_and_are_read_by_the_cloudevents_library(
    suppressed_by: UUID | None, trace: TraceContext | None
) -> None:
    run = runs.run()
    now = datetime.now(UTC)
    finding = finding_for(run, suppressed_by=suppressed_by, now=now)
    validator = _validator(events_schema())

    for event in events_for(run, finding, evaluate(run, PolicySet(())), trace_id=run.trace_id, now=now, trace=trace):
        validator.validate(json.loads(event.body))
        read = JSONFormat().read(CloudEvent, event.body)
        assert read.get_id() == str(event.event_id)
        assert read.get_type() == event.type
        assert read.get_source() == "/closeout"
        assert read.get_subject() == f"{run.tenant_id}/{run.run_id}"
        assert read.get_time() == now
        assert read.get_attributes().get("traceparent") == (trace.traceparent if trace else None)
        assert read.get_attributes().get("tracestate") == (trace.tracestate if trace else None)


def test_the_schema_rejects_an_event_with_missing_fields_or_data_of_another_type() -> None:
    run = runs.run()
    now = datetime.now(UTC)
    finding = finding_for(run, suppressed_by=None, now=now)
    first, second, _ = (
        json.loads(e.body)
        for e in events_for(run, finding, evaluate(run, PolicySet(())), trace_id=run.trace_id, now=now)
    )
    validator = _validator(events_schema())

    assert not validator.is_valid({**first, "data": second["data"]})
    assert not validator.is_valid({**first, "type": "incident.other"})
    for name in first:
        assert not validator.is_valid({key: value for key, value in first.items() if key != name})
    assert validator.is_valid({**first, "traceparent": TRACEPARENT})
    assert not validator.is_valid({**first, "traceparent": f"{TRACEPARENT}-more"})


def test_every_event_type_has_its_own_envelope_schema() -> None:
    schema = events_schema()
    kinds = [_at(schema, branch["$ref"])["properties"]["type"]["const"] for branch in schema["oneOf"]]
    assert kinds == list(get_args(EventType))


def test_times_are_documented_as_rfc_3339() -> None:
    definitions = events_schema()["$defs"]
    assert definitions["RunFinalizedEvent"]["properties"]["time"]["format"] == "date-time"
    assert definitions["RunFinalized"]["properties"]["completed_at"]["format"] == "date-time"
    assert run_completed_schema()["properties"]["started_at"]["format"] == "date-time"


@pytest.mark.parametrize("made", [run_completed_schema, events_schema, asyncapi])
def test_patterns_are_ecma_262(made: Callable[[], dict[str, Any]]) -> None:
    assert "\\Z" not in json.dumps(made())


def test_every_reference_in_the_asyncapi_document_resolves() -> None:
    document = asyncapi()
    references = list(_references(document))
    assert len(references) > 10
    for reference in references:
        assert _at(document, reference)


def test_the_schemas_of_the_asyncapi_document_accept_real_messages() -> None:
    document = asyncapi()
    payload = document["components"]["messages"]["runCompleted"]["payload"]
    _validator({**document, **payload}).validate(runs.message())
    assert not _validator({**document, **payload}).is_valid(runs.message(tenant_id=...))


def test_the_asyncapi_document_describes_the_headers_of_a_parked_message() -> None:
    assert set(asyncapi()["components"]["messages"]["parked"]["headers"]["required"]) == {
        "x-closeout-reason",
        "x-closeout-error",
        "x-closeout-attempts",
        "x-closeout-parked-at",
        "x-closeout-exchange",
        "x-closeout-routing-key",
    }


def test_the_trace_headers_are_described_for_runners_and_subscribers() -> None:
    messages = asyncapi()["components"]["messages"]
    for name in ("runCompleted", "incidentCreated", "incidentSuppressed", "policyEvaluated", "runFinalized"):
        validator = Draft202012Validator(messages[name]["headers"])
        assert validator.is_valid(TraceContext(TRACEPARENT, "a=1").headers)
        assert not validator.is_valid({"traceparent": "00-0"})


def test_the_routing_keys_of_real_events_match_the_channel_addresses() -> None:
    channels = asyncapi()["channels"].values()
    keys = {
        channel["address"].replace(f"{{{name}}}", word)
        for channel in channels
        for name, parameter in channel.get("parameters", {}).items()
        for word in parameter["enum"]
    }
    now = datetime.now(UTC)
    for status in ("succeeded", "failed", "halted", "aborted"):
        run = runs.run(status=status)
        for suppressed_by in (None, uuid4()):
            finding = finding_for(run, suppressed_by=suppressed_by, now=now)
            events = events_for(run, finding, evaluate(run, PolicySet(())), trace_id=run.trace_id, now=now)
            assert {event.routing_key for event in events} <= keys


def test_the_asyncapi_document_has_the_contracts_channels() -> None:
    addresses = {channel["address"] for channel in asyncapi()["channels"].values()}
    assert addresses == {
        "run.completed",
        "closeout.run-completed",
        "closeout.parked",
        "incident.created.{severity}",
        "incident.suppressed.{severity}",
        "policy.evaluated.{outcome}",
        "run.finalized.{status}",
    }


@pytest.mark.parametrize(
    ("name", "made"), [("run-completed", run_completed_schema), ("events", events_schema), ("asyncapi", asyncapi)]
)
def test_the_command_line_prints_each_document(name: str, made: Callable[[], dict[str, Any]]) -> None:
    result = CliRunner().invoke(app, ["schema", name])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(made()))


def _validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def _at(document: dict[str, Any], reference: str) -> Any:
    part: Any = document
    for name in reference.removeprefix("#/").split("/"):
        part = part[name]
    return part


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            else:
                yield from _references(value)
    elif isinstance(part, list):
        for item in part:
            yield from _references(item)
