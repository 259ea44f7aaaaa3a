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
from consumer.contract.run_message import SCHEMA_VERSION
from consumer.contract.scalars import MAX_COST_DECIMALS, MAX_COST_USD
from consumer.contract.trace_context import TRACE
from domains.incidents.rules import Severity
from domains.policies.rules import Outcome
from domains.run import CompletedRun, RunStatus

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_STRICT = (
    " This is the strict form: every message that matches it is accepted as it is. Other spellings are accepted too; "
    "a value that has to be changed, truncated or dropped is recorded as an adjustment. A missing optional field is "
    f"null or its default; unknown fields are ignored. Costs keep {MAX_COST_DECIMALS} digits after the point."
)
# In ECMA-262 $ matches only the end; in Python also before a final newline.
_END = r"(?!\n)$"
_YEAR = r"(000[2-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-8][0-9]{3}|9[0-8][0-9]{2}|99[0-8][0-9]|999[0-8])"
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    rf"02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
# Validators may treat a format as an annotation; a time without an offset must not pass.
_PATTERNS = {
    "date-time": rf"^{_DATE}[Tt]{_TIME}{_END}",
    "uuid": rf"^[0-9A-Fa-f]{{8}}(-[0-9A-Fa-f]{{4}}){{3}}-[0-9A-Fa-f]{{12}}{_END}",
}
_NO_NUL = r"^[^\u0000]*$"
_SCALAR = [{"type": "string", "pattern": _NO_NUL}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]
_ENVELOPE_WORDS = {
    "id": "Unique per event; republishing does not change it.",
    "subject": "<tenant_id>/<run_ref, or run_id>",
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
        _describe_strict_form(definitions["CompletedRun"])
    return definitions


def _describe_strict_form(run: Schema) -> None:
    run["description"] += _STRICT
    properties = run["properties"]
    del properties["run_ref"]  # the text of a run_id that is not a UUID; not a field of the message
    properties["metadata"] |= {
        "additionalProperties": {"anyOf": _SCALAR},
        "propertyNames": {"pattern": _NO_NUL},
        "description": "Also accepted: nested values and lists, up to 1,000 values and 16 levels",
    }
    for name in ("usage", "steps", "metadata", "is_synthetic"):
        default = properties[name].pop("default", None)
        properties[name] = {"anyOf": [properties[name], {"type": "null"}], "default": default}


def _as_on_the_wire(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Complete msgspec's output: decimals may be numbers, and Python regexes become ECMA-262."""
    if isinstance(schema, list):
        return [_as_on_the_wire(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _as_on_the_wire(value) for key, value in schema.items()}
    if made.get("format") == "decimal":
        del made["format"], made["type"]
        # Exponents only as Python's Decimal writes small amounts.
        digits = {"type": "string", "pattern": rf"^[0-9]{{1,12}}(\.[0-9]{{1,60}})?([eE]-[0-9]{{1,2}})?{_END}"}
        return {**made, "anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": int(MAX_COST_USD)}, digits]}
    if made.get("format") in _PATTERNS:
        made["pattern"] = _PATTERNS[made["format"]]
    if isinstance(pattern := made.get("pattern"), str):
        made["pattern"] = pattern.replace(r"\Z", _END)
    elif made.get("type") == "string" and "enum" not in made and "const" not in made:
        made["pattern"] = _NO_NUL
    if isinstance(choices := made.get("enum"), list) and len(choices) == 1:
        made["const"] = made.pop("enum")[0]
    if isinstance(words := made.get("description"), str):
        made["description"] = words.replace("``", "`")
    return made
