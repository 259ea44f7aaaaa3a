"""The contract's documents, generated from the types that decode and encode: JSON Schema 2020-12 and AsyncAPI 3."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Struct

from config.settings import Settings
from consumer import parking
from consumer.errors import ParkReason
from consumer.events import (
    CONTENT_TYPE,
    CloudEvent,
    EventType,
    IncidentCreated,
    IncidentSuppressed,
    PolicyEvaluated,
    RunFinalized,
)
from consumer.frames import PERSISTENT
from consumer.message import CONTENT_TYPE as JSON
from consumer.message import MAX_COST_DECIMALS, MAX_COST_USD, SCHEMA_VERSION
from consumer.metrics import installed_version
from consumer.publisher import EVENTS_EXCHANGE
from consumer.topology import RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.worker import RUN_COMPLETED_QUEUE
from domains.incidents.rules import Severity
from domains.policies.rules import Outcome
from domains.run import CompletedRun, RunStatus

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# The version of AsyncAPI's AMQP bindings.
_BINDING = {"bindingVersion": "0.3.0"}
# What the types cannot say, in words: consumer/message.py holds these rules.
_RULES = (
    " completed_at is not before started_at; each step's index is unique; no text holds NUL or half a surrogate pair; "
    f"whole numbers have no point and no exponent; costs are below {MAX_COST_USD:,} US dollars, with at most "
    f"{MAX_COST_DECIMALS} digits after the point. A missing optional field is null or its default, others ignored."
)
# Validators may take a format for a remark only; a time without its offset must not pass them.
_PATTERNS = {
    "date-time": r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt]([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]+)?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
    "uuid": "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
}
_ENVELOPE_WORDS = {
    "id": "The same however often the event is published.",
    "subject": "<tenant_id>/<run_id>",
    "time": "When the run was closed out.",
}


class _Kind(NamedTuple):
    """One type of event: its data, and what its routing key's last word is called and can be."""

    name: EventType
    data: type[Struct]
    parameter: str
    words: tuple[str, ...]

    @property
    def envelope(self) -> str:
        """The name of its schema."""
        return f"{self.data.__name__}Event"


_KINDS = (
    _Kind("incident.created", IncidentCreated, "severity", get_args(Severity)),
    _Kind("incident.suppressed", IncidentSuppressed, "severity", get_args(Severity)),
    _Kind("policy.evaluated", PolicyEvaluated, "outcome", get_args(Outcome)),
    _Kind("run.finalized", RunFinalized, "status", get_args(RunStatus)),
)


def run_completed_schema() -> Schema:
    """Return the schema of a run-completed message's body."""
    definitions = _definitions([CompletedRun], "#/$defs/")
    run = definitions.pop("CompletedRun")
    identity = {"$schema": _DIALECT, "$id": f"urn:closeout:run-completed:{SCHEMA_VERSION}"}
    return {**identity, **run, "title": "Run completed", "$defs": definitions}


def events_schema() -> Schema:
    """Return the schema of an event's body: a CloudEvent with one of the four types of data."""
    return {
        "$schema": _DIALECT,
        "$id": "urn:closeout:events:1",
        "title": "Closeout event",
        "description": "A CloudEvent 1.0 in structured JSON. Delivery is at least once; remember the id.",
        "oneOf": [{"$ref": f"#/$defs/{kind.envelope}"} for kind in _KINDS],
        "$defs": _definitions([_envelope(kind) for kind in _KINDS], "#/$defs/"),
    }


def asyncapi() -> Schema:
    """Return the AsyncAPI 3 document of what this service receives and sends."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Closeout",
            "version": installed_version(),
            "description": "Closes out agent runs: incident, policy evaluation and trace in one transaction, events "
            "after the commit.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": JSON,
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": _messages(),
            "schemas": _definitions([CompletedRun, *map(_envelope, _KINDS)], "#/components/schemas/"),
        },
    }


def _envelope(kind: _Kind) -> type[Struct]:
    """Return CloudEvent narrowed to *kind*: msgspec has no schema for its union, whose members carry no tag.

    Nothing has a default: all fields are written always.
    """
    hints = get_type_hints(CloudEvent, include_extras=True) | {"type": Literal[kind.name], "data": kind.data}
    return msgspec.defstruct(kind.envelope, list(hints.items()), namespace={"__doc__": kind.data.__doc__})


def _definitions(types: Sequence[type[Struct]], prefix: str) -> Schema:
    """Return the schemas of *types* and of all they hold, by name; they refer to each other by *prefix* and name."""
    _, generated = msgspec.json.schema_components(types, ref_template=prefix + "{name}")
    definitions: Schema = {name: _as_on_the_wire(schema) for name, schema in generated.items()}
    for struct in (*types, *(kind.data for kind in _KINDS)):
        properties = definitions.get(struct.__name__, {}).get("properties", {})
        for field in msgspec.structs.fields(struct):
            # msgspec calls a plain datetime a string; ours are aware, so they are written with their offset.
            if field.type is datetime and field.name in properties:
                properties[field.name] |= _as_on_the_wire({"format": "date-time"})
            if field.name in _ENVELOPE_WORDS and field.name in properties:
                properties[field.name]["description"] = _ENVELOPE_WORDS[field.name]
    if CompletedRun in types:
        definitions["CompletedRun"]["description"] += _RULES
    return definitions


def _as_on_the_wire(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Say what msgspec's output leaves out: decimals may be numbers; and what it says in Python's way: regexes."""
    if isinstance(schema, list):
        return [_as_on_the_wire(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _as_on_the_wire(value) for key, value in schema.items()}
    if made.get("format") == "decimal":
        del made["format"], made["type"]
        digits = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"}
        return {**made, "anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": int(MAX_COST_USD)}, digits]}
    if made.get("format") in _PATTERNS:
        made["pattern"] = _PATTERNS[made["format"]]
    if isinstance(pattern := made.get("pattern"), str):
        made["pattern"] = pattern.replace(r"\Z", "$")  # ECMA-262 has no \Z, and its $ is the very end
    if isinstance(choices := made.get("enum"), list) and len(choices) == 1:
        made["const"] = made.pop("enum")[0]
    if isinstance(words := made.get("description"), str):
        made["description"] = words.replace("``", "`")
    return made


def _channels() -> Schema:
    channels: Schema = {"runs": _channel(RUN_COMPLETED_KEY, RUNS_EXCHANGE, "runCompleted")}
    for kind in _KINDS:
        channel = _channel(f"{kind.name}.{{{kind.parameter}}}", EVENTS_EXCHANGE, _camel(kind.name))
        channel["parameters"] = {kind.parameter: {"enum": [word.lower() for word in kind.words]}}
        channels[_camel(kind.name)] = channel
    bound = f"A quorum queue, bound to exchange {RUNS_EXCHANGE} with routing key {RUN_COMPLETED_KEY}."
    channels["runCompletedQueue"] = _queue(RUN_COMPLETED_QUEUE, "runCompleted", bound)
    channels["parkedQueue"] = _queue(parking.PARKED_QUEUE, "parked", "A quorum queue for what nobody can process.")
    return channels


def _channel(address: str, exchange: str, message: str) -> Schema:
    described = {"name": exchange, "type": "topic", "durable": True, "autoDelete": False}
    return _bound(address, message, {"is": "routingKey", "exchange": described})


def _queue(name: str, message: str, words: str) -> Schema:
    described = {"name": name, "durable": True, "exclusive": False, "autoDelete": False}
    return {"description": words, **_bound(name, message, {"is": "queue", "queue": described})}


def _bound(address: str, message: str, amqp: Schema) -> Schema:
    messages = {message: {"$ref": f"#/components/messages/{message}"}}
    return {"address": address, "messages": messages, "bindings": {"amqp": {**amqp, **_BINDING}}}


def _operations() -> Schema:
    sent = {"deliveryMode": PERSISTENT, "mandatory": True}

    def operation(action: str, channel: str, amqp: Schema) -> Schema:
        bindings = {"amqp": {**amqp, **_BINDING}}
        return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "bindings": bindings}

    operations = {"closeOut": operation("receive", "runCompletedQueue", {"ack": True})}
    for name in map(_camel, get_args(EventType)):
        operations[f"send{name[0].upper()}{name[1:]}"] = operation("send", name, sent)
    return {**operations, "park": operation("send", "parkedQueue", sent)}


def _messages() -> Schema:
    limit = Settings.model_fields["message_max_bytes"].default
    run_completed = {
        "title": "Run completed",
        "summary": f"At most {limit:,} bytes, unless MESSAGE_MAX_BYTES says otherwise. Properties message_id and "
        "user_id are optional, the latter unless TRUSTED_PUBLISHERS is set.",
        "contentType": JSON,
        "headers": {"type": "object", "properties": {"traceparent": {"type": "string"}}},
        "payload": {"$ref": "#/components/schemas/CompletedRun"},
    }
    events = {
        _camel(kind.name): {
            "title": kind.name,
            "summary": "Property message_id is the event's id, correlation_id the run's.",
            "contentType": CONTENT_TYPE,
            "correlationId": {"location": "$message.payload#/data/run_id"},
            "payload": {"$ref": f"#/components/schemas/{kind.envelope}"},
            "bindings": {"amqp": {"messageType": kind.name, **_BINDING}},
        }
        for kind in _KINDS
    }
    return {"runCompleted": run_completed, **events, "parked": _parked_message()}


def _parked_message() -> Schema:
    headers: Schema = {
        parking.REASON: {"enum": list(get_args(ParkReason))},
        parking.ERROR: {"type": "string", "description": "what is wrong, and where"},
        parking.ATTEMPTS: {"type": "integer", "minimum": 0},
        parking.PARKED_AT: {"type": "string", "format": "date-time"},
        parking.EXCHANGE: {"type": "string", "description": "where it was published"},
        parking.ROUTING_KEY: {"type": "string", "description": "under which key"},
    }
    return {
        "title": "A message that nobody can process, whole",
        "summary": "Body, content type, properties and headers as they came, and these headers.",
        "headers": {"type": "object", "properties": headers, "required": list(headers)},
        "payload": {"description": "the body as it came, valid or not"},
    }


def _camel(kind: str) -> str:
    first, second = kind.split(".")
    return first + second.capitalize()
