"""Documents made from a JSON Schema, for the keywords that the published schemas use."""

from typing import Any

from hypothesis import strategies as st

Documents = st.SearchStrategy[Any]
_TEXT = st.characters(exclude_categories=["Cs"])
_UNKNOWN = st.dictionaries(
    st.text(_TEXT).map(lambda name: f"x-{name}"), st.none() | st.text(_TEXT) | st.lists(st.integers()), max_size=2
)
_KNOWN_KEYWORDS = {
    "$schema", "$id", "$defs", "$ref", "title", "description", "default", "examples", "format", "anyOf", "const",
    "enum", "type", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMaximum", "items", "maxItems",
    "properties", "required", "additionalProperties", "propertyNames", "maxProperties",
}  # fmt: skip


def documents(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Documents:
    """Return a strategy for documents that *schema* accepts; raise ``ValueError`` for an unsupported keyword."""
    root = schema if root is None else root
    if unknown := schema.keys() - _KNOWN_KEYWORDS:
        raise ValueError(f"keywords that this module does not support: {sorted(unknown)}")
    if "$ref" in schema:
        target: Any = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        return documents(target, root)
    if "anyOf" in schema:
        rest = {key: value for key, value in schema.items() if key not in {"anyOf", "description", "default"}}
        return st.one_of([documents({**rest, **branch}, root) for branch in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return _OF_TYPE[schema["type"]](schema, root)


def _string(schema: dict[str, Any], _root: dict[str, Any]) -> Documents:
    most = schema.get("maxLength")
    if "pattern" in schema:
        made = st.from_regex(schema["pattern"], alphabet=_TEXT)
        return made if most is None else made.filter(lambda text: len(text) <= most)
    return st.text(_TEXT, max_size=most)


def _integer(schema: dict[str, Any], _root: dict[str, Any]) -> Documents:
    whole = st.integers(schema.get("minimum"), schema.get("maximum"))
    # To JSON Schema 5.0 is an integer.
    return whole | whole.filter(lambda number: abs(number) < 2**53).map(float)


def _number(schema: dict[str, Any], _root: dict[str, Any]) -> Documents:
    least, most, below = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMaximum")
    made = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
    near = st.floats(-1e13, 1e13) | st.integers(-(10**13), 10**13)
    return (made | near).filter(
        lambda number: (
            (least is None or number >= least)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
    )


def _array(schema: dict[str, Any], root: dict[str, Any]) -> Documents:
    return st.lists(documents(schema["items"], root), max_size=min(4, schema.get("maxItems", 4)))


def _object(schema: dict[str, Any], root: dict[str, Any]) -> Documents:
    properties = {name: documents(part, root) for name, part in schema.get("properties", {}).items()}
    required = {name: properties[name] for name in schema.get("required", ())}
    optional = {name: made for name, made in properties.items() if name not in required}
    others: Documents = _UNKNOWN
    if isinstance(values := schema.get("additionalProperties"), dict):
        names = documents({"type": "string", **schema.get("propertyNames", {})}, root)
        others = st.dictionaries(names, documents(values, root), max_size=4)
    return st.builds(lambda named, more: {**more, **named}, st.fixed_dictionaries(required, optional=optional), others)


_OF_TYPE = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": lambda _schema, _root: st.booleans(),
    "null": lambda _schema, _root: st.none(),
    "array": _array,
    "object": _object,
}
