"""The contract's documents, generated from the types that decode and encode: JSON Schema 2020-12 and AsyncAPI 3."""

from collections.abc import Iterable
from typing import Any, get_args

import msgspec

from consumer import parking
from consumer.errors import ParkReason
from consumer.events import (
    CONTENT_TYPE,
    SOURCE,
    CloudEvent,
    IncidentCreated,
    IncidentSuppressed,
    PolicyEvaluated,
    RunFinalized,
)
from consumer.message import CONTENT_TYPE as JSON
from consumer.message import MAX_COST_USD
from consumer.metrics import installed_version
from consumer.publisher import EVENTS_EXCHANGE
from consumer.topology import RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.worker import RUN_COMPLETED_QUEUE
from domains.incidents.rules import Severity
from domains.policies.rules import Outcome
from domains.run import CompletedRun, RunStatus

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# What the types cannot say, in words: consumer/message.py holds these rules.
_RULES = (
    " completed_at is not before started_at; each step's index is unique; no text holds a NUL character; "
    f"costs are below {MAX_COST_USD:,} US dollars. Unknown fields are ignored."
)
# Event type, its data, and the name and values of its routing key's last word.
_EVENTS: tuple[tuple[str, type, str, tuple[str, ...]], ...] = (
    ("incident.created", IncidentCreated, "severity", get_args(Severity)),
    ("incident.suppressed", IncidentSuppressed, "severity", get_args(Severity)),
    ("policy.evaluated", PolicyEvaluated, "outcome", get_args(Outcome)),
    ("run.finalized", RunFinalized, "status", get_args(RunStatus)),
)


def run_completed_schema() -> Schema:
    """Return the schema of a run-completed message's body."""
    definitions = _definitions([CompletedRun])
    run = definitions.pop("CompletedRun")
    run["description"] += _RULES
    return {"$schema": _DIALECT, "$id": "urn:closeout:run-completed:1", **run, "$defs": definitions}


def events_schema() -> Schema:
    """Return the schema of an event's body: one of the four types of CloudEvent."""
    definitions = _definitions([data for _, data, _, _ in _EVENTS])
    envelopes = {f"{data.__name__}Event": _envelope(kind, data) for kind, data, _, _ in _EVENTS}
    return {
        "$schema": _DIALECT,
        "$id": "urn:closeout:events:1",
        "title": "Closeout event",
        "description": "A CloudEvent 1.0 in structured JSON. Delivery is at least once; remember the id.",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in envelopes],
        "$defs": {**envelopes, **definitions},
    }


def asyncapi() -> Schema:
    """Return the AsyncAPI 3 document of what this service receives and sends."""
    schemas = _definitions([CompletedRun, *(data for _, data, _, _ in _EVENTS)])
    schemas["CompletedRun"]["description"] += _RULES
    messages = {"runCompleted": _message("Run completed", JSON, {"$ref": "#/$defs/CompletedRun"})}
    channels: Schema = {"runs": _channel(RUN_COMPLETED_KEY, RUNS_EXCHANGE, "runCompleted")}
    for kind, data, parameter, values in _EVENTS:
        name = _camel(kind)
        messages[name] = _message(kind, CONTENT_TYPE, _envelope(kind, data))
        channels[name] = _channel(f"{kind}.{{{parameter}}}", EVENTS_EXCHANGE, name)
        channels[name]["parameters"] = {parameter: {"enum": [value.lower() for value in values]}}
    messages["parked"] = _parked_message()
    channels["runCompletedQueue"] = _queue(RUN_COMPLETED_QUEUE, "runCompleted")
    channels["parkedQueue"] = _queue(parking.PARKED_QUEUE, "parked")
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Closeout",
            "version": installed_version(),
            "description": "Closes out agent runs: incident, policy evaluation and trace in one transaction, events "
            "after the commit.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": JSON,
        "channels": channels,
        "operations": _operations(channels),
        "components": {"messages": messages, "schemas": schemas},
    }
    moved: Schema = _moved(document, "#/$defs/", "#/components/schemas/")
    return moved


def _definitions(types: Iterable[type]) -> Schema:
    _, definitions = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    return {name: _as_on_the_wire(schema) for name, schema in definitions.items()}


def _as_on_the_wire(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Say what msgspec's output leaves out: decimals may be numbers; and what it says in Python's way: regexes."""
    if isinstance(schema, list):
        return [_as_on_the_wire(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _as_on_the_wire(value) for key, value in schema.items()}
    if made.pop("format", None) == "decimal":
        described = {key: value for key, value in made.items() if key != "type"}
        digits = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"}
        return {"anyOf": [{"type": "number", "minimum": 0}, digits], **described}
    if "format" in schema:
        made["format"] = schema["format"]
    if "pattern" in made:
        made["pattern"] = made["pattern"].removesuffix(r"\Z") + "$"
    if made.get("required") == []:
        del made["required"]
    return made


def _envelope(kind: str, data: type) -> Schema:
    return {
        "type": "object",
        "description": (data.__doc__ or "").strip(),
        "properties": {
            "specversion": {"const": "1.0"},
            "id": {"type": "string", "format": "uuid", "description": "never changes, however often it is published"},
            "source": {"const": SOURCE},
            "type": {"const": kind},
            "subject": {"type": "string", "description": "<tenant_id>/<run_id>"},
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": {"const": JSON},
            "data": {"$ref": f"#/$defs/{data.__name__}"},
        },
        "required": list(CloudEvent.__struct_fields__),
    }


def _message(title: str, content_type: str, payload: Schema) -> Schema:
    return {"name": title, "title": title, "contentType": content_type, "payload": payload}


def _parked_message() -> Schema:
    texts = {
        parking.ERROR: "what is wrong, and where",
        parking.PARKED_AT: "RFC 3339",
        parking.EXCHANGE: "where it was published",
        parking.ROUTING_KEY: "under which key",
    }
    properties: Schema = {name: {"type": "string", "description": words} for name, words in texts.items()}
    properties[parking.REASON] = {"enum": list(get_args(ParkReason))}
    properties[parking.ATTEMPTS] = {"type": "integer", "minimum": 0}
    return {
        "name": "parked",
        "title": "A message that nobody can process, whole",
        "summary": "Body, properties and headers as they came, and these headers.",
        "headers": {"type": "object", "properties": properties, "required": sorted(properties)},
        "payload": {"description": "the body as it came, valid or not"},
    }


def _channel(address: str, exchange: str, message: str) -> Schema:
    described = {"name": exchange, "type": "topic", "durable": True, "autoDelete": False}
    return {
        "address": address,
        "messages": {message: {"$ref": f"#/components/messages/{message}"}},
        "bindings": {"amqp": {"is": "routingKey", "exchange": described, "bindingVersion": "0.3.0"}},
    }


def _queue(name: str, message: str) -> Schema:
    described = {"name": name, "durable": True, "exclusive": False, "autoDelete": False}
    return {
        "address": name,
        "messages": {message: {"$ref": f"#/components/messages/{message}"}},
        "bindings": {"amqp": {"is": "queue", "queue": described, "bindingVersion": "0.3.0"}},
    }


def _operations(channels: Schema) -> Schema:
    def operation(action: str, channel: str) -> Schema:
        return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}

    sent = [name for name in channels if name not in {"runs", "runCompletedQueue"}]
    return {
        "closeOut": operation("receive", "runCompletedQueue"),
        **{f"send{name[0].upper()}{name[1:]}": operation("send", name) for name in sent},
    }


def _camel(kind: str) -> str:
    first, second = kind.split(".")
    return first + second.capitalize()


def _moved(part: Any, old: str, new: str) -> Any:  # noqa: ANN401 - any part of a document
    """Return a copy of *part* whose references point from *old* to *new*."""
    if isinstance(part, list):
        return [_moved(item, old, new) for item in part]
    if isinstance(part, dict):
        return {
            key: value.replace(old, new) if key == "$ref" else _moved(value, old, new) for key, value in part.items()
        }
    return part
