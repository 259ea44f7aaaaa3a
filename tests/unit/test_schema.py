"""The printed documents say what the code does."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from consumer.cli import app
from consumer.errors import MessageRefusedError
from consumer.events import events_for
from consumer.message import decode
from consumer.schema import asyncapi, events_schema, run_completed_schema
from domains.incidents.rules import finding_for
from domains.policies.rules import PolicySet, evaluate
from tests import runs

REFUSED_BY_SHAPE = [
    {"tenant_id": ...},
    {"tenant_id": "no spaces"},
    {"tenant_id": "x" * 129},
    {"schema_version": 2},
    {"run_id": 5},
    {"status": "done"},
    {"error_code": "lower"},
    {"error_code": "X" * 65},
    {"started_at": 5},
    {"usage": {"cost_usd": -1}},
    {"usage": {"cost_usd": "a lot"}},
    {"usage": {"input_tokens": -1}},
    {"usage": {"input_tokens": 2**63}},
    {"usage": None},
    {"steps": [{"index": 0}]},
    {"steps": [{"index": -1, "status": "failed"}]},
    {"steps": [{"index": n, "status": "failed"} for n in range(1001)]},
    {"metadata": {"a": []}},
    {"metadata": {str(n): n for n in range(65)}},
    {"is_synthetic": None},
]
ACCEPTED = [
    {},
    {"usage": {"cost_usd": "0.01"}},
    {"usage": {"cost_usd": None}},
    {"trace_id": None, "agent_id": ..., "steps": ..., "metadata": ..., "usage": ...},
    {"unknown": {"field": [1]}},
]


def test_the_schemas_are_valid_json_schema_2020_12():
    for schema in (run_completed_schema(), events_schema()):
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("changes", REFUSED_BY_SHAPE, ids=str)
def test_what_the_decoder_refuses_by_shape_the_schema_refuses_too(changes: dict[str, Any]):
    fields = runs.message(**changes)
    with pytest.raises(MessageRefusedError):
        decode(json.dumps(fields).encode(), max_bytes=1_000_000)
    assert not Draft202012Validator(run_completed_schema()).is_valid(fields)


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_what_the_decoder_takes_the_schema_takes_too(changes: dict[str, Any]):
    fields = runs.message(**changes)
    decode(json.dumps(fields).encode(), max_bytes=1_000_000)
    Draft202012Validator(run_completed_schema()).validate(fields)


@pytest.mark.parametrize("suppressed_by", [None, uuid4()])
def test_real_events_follow_the_schema_and_another_implementation_of_cloudevents_reads_them(suppressed_by):
    run = runs.run()
    now = datetime.now(UTC)
    finding = finding_for(run, suppressed_by=suppressed_by, now=now)
    validator = Draft202012Validator(events_schema())

    for event in events_for(run, finding, evaluate(run, PolicySet(())), now=now):
        validator.validate(json.loads(event.body))
        read = JSONFormat().read(CloudEvent, event.body)
        assert read.get_id() == str(event.event_id)
        assert read.get_type() == event.type
        assert read.get_source() == "/closeout"
        assert read.get_subject() == f"{run.tenant_id}/{run.run_id}"
        assert read.get_time() == now


def test_every_reference_in_the_asyncapi_document_resolves():
    document = asyncapi()
    references = list(_references(document))
    assert len(references) > 10
    for reference in references:
        part: Any = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_the_asyncapi_document_names_the_contracts_channels():
    addresses = {channel["address"] for channel in asyncapi()["channels"].values()}
    assert addresses == {
        "run.completed", "closeout.run-completed", "closeout.parked", "incident.created.{severity}",
        "incident.suppressed.{severity}", "policy.evaluated.{outcome}", "run.finalized.{status}",
    }


@pytest.mark.parametrize(
    ("name", "made"), [("run-completed", run_completed_schema), ("events", events_schema), ("asyncapi", asyncapi)]
)
def test_the_command_line_prints_each_document(name, made):
    result = CliRunner().invoke(app, ["schema", name])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(made()))


def _references(part: Any) -> Any:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            else:
                yield from _references(value)
    elif isinstance(part, list):
        for item in part:
            yield from _references(item)
