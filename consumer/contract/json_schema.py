"""JSON Schemas (2020-12) of messages and events, generated from the types that decode and encode them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Struct

from consumer.contract.events import (
    CloudEvent,
    EventType,
    IncidentCreated,
    IncidentSuppressed,
    PolicyEvaluated,
    RunFinalized,
)
from consumer.contract.run_message import MAX_COST_DECIMALS, MAX_COST_USD, SCHEMA_VERSION
from consumer.contract.trace_context import TRACE
from domains.incidents.rules import Severity
from domains.policies.rules import Outcome
from domains.run import CompletedRun, RunStatus

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Rules that the types cannot express; run_message.py enforces them.
_RULES = (
    " completed_at is not before started_at; each step's index is unique; no text holds NUL or half a surrogate pair; "
    f"whole numbers have no point and no exponent; costs are below {MAX_COST_USD:,} US dollars, with at most "
    f"{MAX_COST_DECIMALS} digits after the point. A missing optional field is null or its default; "
    "unknown fields are ignored."
)
# Validators may treat a format as an annotation; a time without an offset must not pass.
_PATTERNS = {
    "date-time": r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt]([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]+)?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
    "uuid": "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
}
_ENVELOPE_WORDS = {
    "id": "Unique per event; republishing does not change it.",
    "subject": "<tenant_id>/<run_id>",
    "time": "The time of the close-out.",
}


class Kind(NamedTuple):
    """One event type: its data, and the name and values of the last word of its routing key."""

    name: EventType
    data: type[Struct]
    parameter: str
    words: tuple[str, ...]

    @property
    def envelope(self) -> str:
        """The name of its schema."""
        return f"{self.data.__name__}Event"


KINDS = (
    Kind("incident.created", IncidentCreated, "severity", get_args(Severity)),
    Kind("incident.suppressed", IncidentSuppressed, "severity", get_args(Severity)),
    Kind("policy.evaluated", PolicyEvaluated, "outcome", get_args(Outcome)),
    Kind("run.finalized", RunFinalized, "status", get_args(RunStatus)),
)


def run_completed_schema() -> Schema:
    """Return the schema of a run-completed message's body."""
    definitions = definitions_of([CompletedRun], "#/$defs/")
    run = definitions.pop("CompletedRun")
    identity = {"$schema": _DIALECT, "$id": f"urn:closeout:run-completed:{SCHEMA_VERSION}"}
    return {**identity, **run, "title": "Run completed", "$defs": definitions}


def events_schema() -> Schema:
    """Return the schema of an event's body: a CloudEvent with one of the four types of data."""
    return {
        "$schema": _DIALECT,
        "$id": "urn:closeout:events:1",
        "title": "Closeout event",
        "description": "A CloudEvent 1.0 in structured JSON. Delivery is at least once; deduplicate by id.",
        "oneOf": [{"$ref": f"#/$defs/{kind.envelope}"} for kind in KINDS],
        "$defs": definitions_of([envelope_of(kind) for kind in KINDS], "#/$defs/"),
    }


def envelope_of(kind: Kind) -> type[Struct]:
    """Return CloudEvent narrowed to *kind*: msgspec has no schema for a union of untagged members.

    Only the fields in :data:`TRACE` have a default; all others are always written.
    """
    hints = get_type_hints(CloudEvent, include_extras=True) | {"type": Literal[kind.name], "data": kind.data}
    fields = [(name, hint, UNSET) if name in TRACE else (name, hint) for name, hint in hints.items()]
    return msgspec.defstruct(kind.envelope, fields, namespace={"__doc__": kind.data.__doc__}, kw_only=True)


def definitions_of(types: Sequence[type[Struct]], prefix: str) -> Schema:
    """Return the schemas of *types* and their members by name; references are *prefix* plus name."""
    _, generated = msgspec.json.schema_components(types, ref_template=prefix + "{name}")
    definitions: Schema = {name: _as_on_the_wire(schema) for name, schema in generated.items()}
    for struct in (*types, *(kind.data for kind in KINDS)):
        properties = definitions.get(struct.__name__, {}).get("properties", {})
        for field in msgspec.structs.fields(struct):
            # msgspec describes a naive datetime; these are aware and written with their offset.
            if field.type is datetime and field.name in properties:
                properties[field.name] |= _as_on_the_wire({"format": "date-time"})
            if field.name in _ENVELOPE_WORDS and field.name in properties:
                properties[field.name]["description"] = _ENVELOPE_WORDS[field.name]
    if CompletedRun in types:
        definitions["CompletedRun"]["description"] += _RULES
    return definitions


def _as_on_the_wire(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Complete msgspec's output: decimals may be numbers, and Python regexes become ECMA-262."""
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
        made["pattern"] = pattern.replace(r"\Z", "$")  # ECMA-262 has no \Z; its $ matches only the end
    if isinstance(choices := made.get("enum"), list) and len(choices) == 1:
        made["const"] = made.pop("enum")[0]
    if isinstance(words := made.get("description"), str):
        made["description"] = words.replace("``", "`")
    return made
