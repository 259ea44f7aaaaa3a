"""The AsyncAPI 3 document of what this service receives and sends, with the schemas of ``json_schema.py``."""

from typing import get_args

from config.settings import Settings
from consumer.contract import names
from consumer.contract.events import CONTENT_TYPE, EventType
from consumer.contract.json_schema import KINDS, Schema, definitions_of, envelope_of
from consumer.contract.names import EVENTS_EXCHANGE, PERSISTENT, RUN_COMPLETED_KEY, RUN_COMPLETED_QUEUE, RUNS_EXCHANGE
from consumer.contract.names import RUN_CONTENT_TYPE as JSON
from consumer.contract.refusals import ParkReason
from consumer.contract.trace_context import TRACEPARENT, TRACEPARENT_PATTERN, TRACESTATE, TRACESTATE_CHARACTERS_MAX
from consumer.version import installed_version
from domains.run import CompletedRun

# The version of AsyncAPI's AMQP bindings.
_BINDING = {"bindingVersion": "0.3.0"}


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
            "schemas": definitions_of([CompletedRun, *map(envelope_of, KINDS)], "#/components/schemas/"),
        },
    }


def _channels() -> Schema:
    channels: Schema = {"runs": _channel(RUN_COMPLETED_KEY, RUNS_EXCHANGE, "runCompleted")}
    for kind in KINDS:
        channel = _channel(f"{kind.name}.{{{kind.parameter}}}", EVENTS_EXCHANGE, _camel(kind.name))
        channel["parameters"] = {kind.parameter: {"enum": [word.lower() for word in kind.words]}}
        channels[_camel(kind.name)] = channel
    bound = f"A quorum queue, bound to exchange {RUNS_EXCHANGE} with routing key {RUN_COMPLETED_KEY}."
    channels["runCompletedQueue"] = _queue(RUN_COMPLETED_QUEUE, "runCompleted", bound)
    channels["parkedQueue"] = _queue(names.PARKED_QUEUE, "parked", "Messages that cannot be processed: a quorum queue.")
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
        "summary": f"At most {limit:,} bytes by default (MESSAGE_MAX_BYTES). The properties message_id and user_id are "
        "optional; user_id is required if TRUSTED_PUBLISHERS is set.",
        "contentType": JSON,
        "headers": _trace_headers("W3C: the runner's span, parent of the run's events; an invalid value is ignored"),
        "payload": {"$ref": "#/components/schemas/CompletedRun"},
    }
    events = {
        _camel(kind.name): {
            "title": kind.name,
            "summary": "The property message_id is the event's id, correlation_id is the run's id.",
            "contentType": CONTENT_TYPE,
            "correlationId": {"location": "$message.payload#/data/run_id"},
            "headers": _trace_headers("the attribute of the same name, if the event has it"),
            "payload": {"$ref": f"#/components/schemas/{kind.envelope}"},
            "bindings": {"amqp": {"messageType": kind.name, **_BINDING}},
        }
        for kind in KINDS
    }
    return {"runCompleted": run_completed, **events, "parked": _parked_message()}


def _trace_headers(words: str) -> Schema:
    traceparent = {"type": "string", "pattern": TRACEPARENT_PATTERN, "description": words}
    tracestate = {"type": "string", "maxLength": TRACESTATE_CHARACTERS_MAX, "description": "W3C, next to traceparent"}
    return {"type": "object", "properties": {TRACEPARENT: traceparent, TRACESTATE: tracestate}}


def _parked_message() -> Schema:
    headers: Schema = {
        names.REASON_HEADER: {"enum": list(get_args(ParkReason))},
        names.ERROR_HEADER: {"type": "string", "description": "what is wrong, and where"},
        names.ATTEMPTS_HEADER: {"type": "integer", "minimum": 0},
        names.PARKED_AT_HEADER: {"type": "string", "format": "date-time"},
        names.EXCHANGE_HEADER: {"type": "string", "description": "where it was published"},
        names.ROUTING_KEY_HEADER: {"type": "string", "description": "the routing key with which it was published"},
    }
    return {
        "title": "A message that cannot be processed, unmodified",
        "summary": "Body, properties and headers as received, plus these headers.",
        "headers": {"type": "object", "properties": headers, "required": list(headers)},
        "payload": {"description": "the body as received, valid or not"},
    }


def _camel(kind: str) -> str:
    first, second = kind.split(".")
    return first + second.capitalize()
