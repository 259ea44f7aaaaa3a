"""Bytes and headers become a run, or a refusal that names what to fix."""

import json
import operator
from contextlib import suppress
from copy import deepcopy
from datetime import UTC, datetime
from decimal import Decimal
from functools import reduce
from typing import Any, get_args
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.contract.refusals import MAX_ERROR_CHARACTERS, MessageRefusedError, ParkReason
from consumer.contract.run_message import Decoded, decode
from tests.support import run_messages as runs

MAX_BYTES = 1_048_576
RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
TENANT_RULE = "expected 1 to 128 characters of A-Z a-z 0-9 . _ - : @ + ~ ="
TIME_RULE = "expected RFC 3339 with an offset such as 2026-11-01T12:00:00Z"
ID_RULE = f"expected a UUID such as {RUN_ID}, or 1 to 200 printable ASCII characters"
STATUS_RULE = "expected one of succeeded, failed, halted, aborted"
SCALARS = {"s": "", "i": -(2**63), "f": 0.5, "b": False, "n": None}
LONG = "m" * 1_024

TOO_DEEP = "the body is nested too deeply, and is not complete; expected one JSON object"


def take(body: bytes, **properties: Any) -> Decoded:
    return decode(body, **{"max_bytes": MAX_BYTES, **properties})


def refusal(body: bytes, **properties: Any) -> tuple[str, str]:
    with pytest.raises(MessageRefusedError) as caught:
        take(body, **properties)
    return caught.value.reason, str(caught.value)


def step(**changes: Any) -> dict[str, Any]:
    return {"index": 0, "status": "failed", **changes}


def with_metadata(raw: str) -> bytes:
    """A valid message whose ``metadata.a`` is *raw* unmodified, JSON or not."""
    fields = runs.message(run_id=RUN_ID, trace_id=None, metadata={"a": "MARK"})
    return json.dumps(fields).replace('"MARK"', raw).encode("utf-8", "surrogatepass")


ACCEPTED: list[tuple[str, Any, Any]] = [
    ("tenant_id", "a", "a"),
    ("tenant_id", "AZaz09._-:@+~=" + "x" * 114, "AZaz09._-:@+~=" + "x" * 114),
    ("run_id", RUN_ID.upper(), UUID(RUN_ID)),
    ("agent_id", None, None),
    ("agent_id", "", ""),
    ("agent_id", ..., None),
    ("agent_id", "ä\U0001f600", "ä\U0001f600"),
    *((("status", word, word)) for word in ("succeeded", "failed", "halted", "aborted")),
    ("error_code", None, None),
    ("error_code", ..., None),
    ("error_code", "A", "A"),
    ("error_code", "Z" + "_9" * 31 + "X", "Z" + "_9" * 31 + "X"),
    ("error_message", None, None),
    ("error_message", ..., None),
    ("error_message", "\x01\x7f\u2028￿\U0010ffff", "\x01\x7f\u2028￿\U0010ffff"),
    ("error_message", "\\u0000 spelled out", "\\u0000 spelled out"),
    ("trace_id", None, None),
    ("trace_id", ..., None),
    ("trace_id", RUN_ID, UUID(RUN_ID)),
    ("started_at", "0001-01-02T00:00:00Z", datetime(1, 1, 2, tzinfo=UTC)),
    ("started_at", "2026-11-01T14:00:00+02:00", datetime(2026, 11, 1, 12, tzinfo=UTC)),
    ("completed_at", "2026-11-01T12:00:00Z", datetime(2026, 11, 1, 12, tzinfo=UTC)),
    ("completed_at", "2026-11-01T11:59:59.999999Z", datetime(2026, 11, 1, 11, 59, 59, 999999, tzinfo=UTC)),
    ("completed_at", "9999-12-30T23:59:59.999999Z", datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=UTC)),
    ("model", None, None),
    ("model", ..., None),
    ("model", LONG, LONG),
    ("steps", ..., ()),
    ("steps", [], ()),
    ("is_synthetic", ..., False),
    ("is_synthetic", True, True),
    ("synthetic_scenario_id", ..., None),
    ("synthetic_scenario_id", "s-1", "s-1"),
    ("metadata", ..., {}),
    ("metadata", SCALARS, SCALARS),
    ("metadata", {str(n): n for n in range(1_000)}, {str(n): n for n in range(1_000)}),
    ("metadata", {"a": {"b": [1, {"c": None}], "d": []}}, {"a": {"b": [1, {"c": None}], "d": []}}),
    ("parent_run_id", "01JDMV7Z1W2M6Q0B7Y6R2J9T5X", "01JDMV7Z1W2M6Q0B7Y6R2J9T5X"),
    ("session_id", "c-17", "c-17"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "sent", "held"), ACCEPTED, ids=lambda value: str(value)[:40])
def test_a_field_is_accepted_up_to_its_limits(field: str, sent: Any, held: Any):
    decoded = take(runs.body(**{field: sent}))
    assert (getattr(decoded.run, field), decoded.adjustments) == (held, ())


def test_a_minimal_message_gets_defaults_for_optional_fields():
    required = ("schema_version", "tenant_id", "run_id", "status", "started_at", "completed_at")
    fields = {name: value for name, value in runs.message().items() if name in required}
    run = take(json.dumps(fields).encode()).run
    assert (run.agent_id, run.error_code, run.error_message, run.trace_id, run.model) == (None,) * 5
    assert (run.usage.cost_usd, run.usage.input_tokens, run.usage.output_tokens) == (None,) * 3
    assert (run.steps, run.is_synthetic, run.synthetic_scenario_id, run.metadata) == ((), False, None, {})


@pytest.mark.parametrize(
    ("sent", "held"),
    [
        ("0", Decimal(0)),
        ("0.1", Decimal("0.1")),
        ("0.1234567890123456789012345", Decimal("0.1234567890123456789012345")),
        ('"0.0125"', Decimal("0.0125")),
        ("1e-40", Decimal("1e-40")),
        ("999999999999.99", Decimal("999999999999.99")),
        ("null", None),
    ],
)
def test_a_cost_is_stored_exactly(sent: str, held: Decimal | None):
    body = runs.body(usage={"cost_usd": "MARK"}, steps=[step(cost_usd="MARK")]).replace(b'"MARK"', sent.encode())
    run = take(body).run
    assert run.usage.cost_usd == held
    assert run.steps[0].cost_usd == held


@pytest.mark.parametrize("tokens", [0, 2**63 - 1, None])
def test_token_counts_are_accepted_up_to_a_bigint(tokens: int | None):
    usage = take(runs.body(usage={"input_tokens": tokens, "output_tokens": tokens})).run.usage
    assert (usage.input_tokens, usage.output_tokens) == (tokens, tokens)


def test_a_thousand_steps_in_any_order_are_accepted():
    steps = [step(index=index, skill=None, duration_ms=2**63 - 1, error_code="E") for index in reversed(range(1000))]
    steps[0]["index"] = 2**31 - 1
    held = take(runs.body(steps=steps)).run.steps
    assert len(held) == 1000
    assert (held[0].index, held[0].duration_ms, held[-1].index) == (2**31 - 1, 2**63 - 1, 0)


@pytest.mark.parametrize(
    "extra",
    [
        {"unknown": {"field": [1, {"deep": None}]}},
        {"unknown": "\x00"},
        {"usage": {"cost_usd": 1, "unknown": [1]}},
        {"usage": {"cost_usd": 1, "unknown": "\x00"}},
        {"steps": [step(unknown={"a": 1})]},
        {"steps": [step(unknown="\x00")]},
    ],
    ids=str,
)
def test_unknown_fields_are_ignored_at_every_level(extra: dict[str, Any]):
    take(runs.body(**extra))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schema_version": ...}, "schema_version: missing; expected 1"),
    ({"schema_version": None}, "schema_version: found null; expected 1"),
    ({"tenant_id": ...}, f"tenant_id: missing; {TENANT_RULE}"),
    ({"tenant_id": None}, f"tenant_id: found null; {TENANT_RULE}"),
    ({"tenant_id": ""}, f'tenant_id: found ""; {TENANT_RULE}'),
    ({"tenant_id": "a b"}, f'tenant_id: found "a b"; {TENANT_RULE}'),
    ({"tenant_id": "a/b"}, f'tenant_id: found "a/b"; {TENANT_RULE}'),
    ({"tenant_id": "a\n"}, f'tenant_id: found "a\\n"; {TENANT_RULE}'),
    ({"tenant_id": "ä"}, f'tenant_id: found "\\u00e4"; {TENANT_RULE}'),
    ({"tenant_id": "x" * 129}, f'tenant_id: found "{"x" * 79}…; {TENANT_RULE}'),
    ({"tenant_id": True}, f"tenant_id: found true; {TENANT_RULE}"),
    ({"tenant_id": -1}, f"tenant_id: found -1; {TENANT_RULE}"),
    ({"tenant_id": 1.5}, f"tenant_id: found 1.5; {TENANT_RULE}"),
    ({"run_id": ...}, f"run_id: missing; {ID_RULE}"),
    ({"run_id": None}, f"run_id: found null; {ID_RULE}"),
    ({"run_id": ""}, f'run_id: found ""; {ID_RULE}'),
    ({"run_id": "a b"}, f'run_id: found "a b"; {ID_RULE}'),
    ({"run_id": "ä"}, f'run_id: found "\\u00e4"; {ID_RULE}'),
    ({"run_id": "x" * 201}, f'run_id: found "{"x" * 79}…; {ID_RULE}'),
    ({"run_id": [RUN_ID]}, f"run_id: found a list of 1 items; {ID_RULE}"),
    ({"status": ...}, f"status: missing; {STATUS_RULE}"),
    ({"status": "timed_out"}, f'status: found "timed_out"; {STATUS_RULE}'),
    ({"status": None}, f"status: found null; {STATUS_RULE}"),
    ({"status": True}, f"status: found true; {STATUS_RULE}"),
    ({"started_at": ...}, f"started_at: missing; {TIME_RULE}"),
    ({"started_at": "2026-11-01T12:00:00"}, f'started_at: found "2026-11-01T12:00:00"; {TIME_RULE}'),
    ({"started_at": "2026-11-01"}, f'started_at: found "2026-11-01"; {TIME_RULE}'),
    ({"started_at": 1793534400}, f"started_at: found 1793534400; {TIME_RULE}"),
    ({"started_at": 1793534400.5}, f"started_at: found 1793534400.5; {TIME_RULE}"),
    ({"completed_at": "2026-02-30T00:00:00Z"}, f'completed_at: found "2026-02-30T00:00:00Z"; {TIME_RULE}'),
    ({"completed_at": "2026-02-28T23:58:60Z"}, f'completed_at: found "2026-02-28T23:58:60Z"; {TIME_RULE}'),
    ({"completed_at": None}, f"completed_at: found null; {TIME_RULE}"),
    ({"started_at": "0001-01-01T00:00:00+23:59"}, f'started_at: found "0001-01-01T00:00:00+23:59"; {TIME_RULE}'),
    ({"completed_at": "9999-12-31T23:59:60Z"}, f'completed_at: found "9999-12-31T23:59:60Z"; {TIME_RULE}'),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=lambda value: str(value)[:50])
def test_an_invalid_required_field_is_refused_with_the_value_found_and_the_expected_one(
    changes: dict[str, Any], text: str
):
    assert refusal(runs.body(**changes)) == ("schema_violation", text)


@pytest.mark.parametrize(
    ("version", "found"),
    [
        (0, "0"),
        (2, "2"),
        (-1, "-1"),
        (1.5, "1.5"),
        ("1", '"1"'),
        (True, "true"),
        ([1], "a list of 1 items"),
        (10**400, "an integer of hundreds of digits"),
    ],
)
def test_an_unsupported_version_has_its_own_reason(version: Any, found: str):
    text = f"schema_version: found {found}; expected 1"
    assert refusal(runs.body(schema_version=version)) == ("unsupported_schema_version", text)


def test_an_unsupported_version_is_reported_before_other_errors():
    assert refusal(b'{"schema_version": 2}')[0] == "unsupported_schema_version"


MALFORMED = [
    (b"", "the body is empty; expected one JSON object"),
    (b" \r\n\t", "the body is empty; expected one JSON object"),
    (b"\x00", "not JSON: invalid character (byte 0); expected one JSON object in UTF-8"),
    (b'{"a": 1}x', "not JSON: trailing characters (byte 9); expected one JSON object in UTF-8"),
    (b'{"a": 1}{"a": 1}', "not JSON: trailing characters (byte 9); expected one JSON object in UTF-8"),
    (b'{"a": 1', "not JSON: Input data was truncated; expected one JSON object in UTF-8"),
    (b"{'a': 1}", "not JSON: object keys must be strings (byte 1); expected one JSON object in UTF-8"),
    (b'{"a": NaN}', "not JSON: invalid character (byte 6); expected one JSON object in UTF-8"),
    (b'{"a": "\xff"}', "byte 7 (0xff) is not UTF-8; expected a JSON object in UTF-8"),
    (b'{"a": "\xc0\x80"}', "byte 7 (0xc0) is not UTF-8; expected a JSON object in UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "byte 7 (0xed) is not UTF-8; expected a JSON object in UTF-8"),
    ("{}".encode("utf-16"), "byte 0 (0xff) is not UTF-8; expected a JSON object in UTF-8"),
    (b"[" * 100_000, TOO_DEEP),
    (b'{"a":' * 100_000, TOO_DEEP),
    (b'{"a": "\\ud800', "not JSON: Input data was truncated; expected one JSON object in UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), MALFORMED, ids=lambda value: str(value)[:30])
def test_invalid_json_is_refused_with_the_position_of_the_error(body: bytes, words: str):
    assert refusal(body) == ("invalid_json", words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"null", "the body is null; expected one JSON object"),
        (b"[]", "the body is a list of 0 items; expected one JSON object"),
        (b'"run"', 'the body is "run"; expected one JSON object'),
        (b"17", "the body is 17; expected one JSON object"),
        (b"1e999", "the body is 1e999; expected one JSON object"),
        (b"{}", "schema_version: missing; expected 1"),
    ],
)
def test_json_that_is_not_a_run_is_a_schema_violation(body: bytes, words: str):
    assert refusal(body) == ("schema_violation", words)


TORTURE = [
    with_metadata("[" * 5000 + "]" * 5000),
    with_metadata("9" * 4299),
    with_metadata("-" + "9" * 4301),
    with_metadata("1." + "0" * 100_000),
    with_metadata("1e-99999999999999999999"),
    with_metadata('"\\ud800\\ud800"'),
    with_metadata('"\\udc00\\ud800"'),
    with_metadata('"\ud800"'),
    with_metadata('"\\u00"'),
    with_metadata("Infinity"),
    runs.body(metadata={"\x00" * 3: 1}),
    runs.body(metadata={"k" * 100_000 + "\x00": 1}),
    runs.body(metadata={"k" * 100_000: []}),
    runs.body(metadata={"k\n`$.x[9]": []}),
    runs.body(metadata={"\U0001f600" * 1000: []}),
    runs.body(metadata={"": {}}),
    runs.body(error_code="\U0001f600" * 10_000),
    runs.body(tenant_id="`$[...]`" * 10),
    runs.body(usage={"cost_usd": "9" * 100_000}),
    runs.body(usage={"cost_usd": "1e999999999999999999"}),
    runs.body(usage={"cost_usd": "-0"}),
    runs.body(schema_version="x" * 100_000),
    runs.body(schema_version=[[]]),
    runs.body({**runs.message(), "k" * 100_000: "\x00"}),
    b"\x00" * 1000,
    b"\xff" * 1000,
    b"1" * 100_000,
    b'"' * 1000,
    b"{}" * 1000,
    b"[" + b"1," * 300_000 + b"1]",
    b'{"schema_version":1,' + b'"a":1,' * 50_000 + b'"a":1}',
]


@pytest.mark.parametrize("body", TORTURE, ids=lambda body: repr(body[-20:]))
def test_a_torture_body_ends_in_a_run_or_a_refusal_that_fits_a_header(body: bytes):
    _assert_settles(body)


def test_the_last_value_of_a_repeated_key_is_used():
    twice = runs.body(agent_id="second").replace(b'"schema_version"', b'"agent_id": "first", "schema_version"')
    assert take(twice).run.agent_id == "second"
    assert refusal(runs.body(status=5).replace(b'"schema_version"', b'"status": "failed", "schema_version"')) == (
        "schema_violation",
        f"status: found 5; {STATUS_RULE}",
    )


def test_a_body_one_byte_over_the_limit_is_refused_before_it_is_read():
    body = runs.body()
    take(body, max_bytes=len(body))
    assert refusal(b"\xff" * 101, max_bytes=100) == (
        "too_large",
        "the body has 101 bytes; the limit is 100 (MESSAGE_MAX_BYTES)",
    )


def test_only_trusted_publishers_are_accepted_where_any_are_configured():
    trusted = frozenset({"runner"})
    take(runs.body(), user_id="anybody")
    take(runs.body(), user_id="runner", trusted_publishers=trusted)
    for user_id, found in ((None, "none"), ("Runner", '"Runner"'), ("", '""')):
        assert refusal(runs.body(), user_id=user_id, trusted_publishers=trusted) == (
            "untrusted_publisher",
            f"property user_id: found {found}; expected one of TRUSTED_PUBLISHERS",
        )


def test_hostile_properties_are_truncated():
    for properties in (
        {"content_encoding": "\n" * 5000 + "x"},
        {"user_id": "\U0001f600" * 5000, "trusted_publishers": frozenset({"a"})},
    ):
        _, words = refusal(runs.body(), **properties)
        assert len(words) <= MAX_ERROR_CHARACTERS


def test_the_digest_ignores_order_white_space_and_escapes():
    fields = runs.message(agent_id="ä", metadata={"b": 1.5, "a": None})
    digest = take(json.dumps(fields).encode()).digest
    turned = dict(reversed(fields.items()))
    turned["metadata"] = dict(reversed(fields["metadata"].items()))
    turned["usage"] = dict(reversed(fields["usage"].items()))
    for again in (
        json.dumps(turned).encode(),
        json.dumps(fields, indent=4).encode() + b"\n",
        json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(),
    ):
        assert take(again).digest == digest


@pytest.mark.parametrize(
    "changes",
    [
        {"agent_id": None},
        {"agent_id": ...},
        {"status": "halted"},
        {"steps": []},
        {"metadata": {"a": 2}},
        {"metadata": {"a": "1"}},
        {"metadata": {"a": 1.0}},
        {"metadata": {"a": True}},
        {"metadata": {"a": 1, "b": None}},
        {"usage": {"cost_usd": 0.0126}},
        {"unknown": 1},
        {"is_synthetic": False},
    ],
    ids=str,
)
def test_changed_content_changes_the_digest_also_in_unknown_fields(changes: dict[str, Any]):
    fields = runs.message(metadata={"a": 1})
    before = take(json.dumps(fields).encode()).digest
    changed = {name: value for name, value in {**fields, **changes}.items() if value is not ...}
    assert take(json.dumps(changed).encode()).digest != before


def test_a_fraction_and_the_text_of_that_fraction_have_different_digests():
    assert take(with_metadata("1.5")).digest != take(with_metadata('"1.5"')).digest


def test_the_digest_distinguishes_numbers_that_a_double_cannot():
    assert take(with_metadata("0.1")).digest != take(with_metadata("0.10000000000000000000001")).digest


def test_steps_in_another_order_change_the_digest():
    fields = runs.message()
    before = take(json.dumps(fields).encode()).digest
    assert take(json.dumps({**fields, "steps": fields["steps"][::-1]}).encode()).digest != before


_AWKWARD: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "NaN", "-1",
    "\x00", "\ud800", "\U0001f600", "x" * 10_000, "1e99999999999999999999", "2026-11-01T12:00:00Z", RUN_ID, "failed",
    [], [[]], [None] * 1001, {}, {"\x00": 1}, {"": {}}, {"index": 0, "status": "failed"}, {"cost_usd": "x"}, ...,
]  # fmt: skip
_PLACES = [
    *((name,) for name in (*runs.message(), "is_synthetic", "synthetic_scenario_id", "unknown", "x" * 600, "\x00")),
    *(("usage", name) for name in ("cost_usd", "input_tokens", "output_tokens", "unknown")),
    *(("steps", 1, name) for name in ("index", "skill", "status", "duration_ms", "cost_usd", "error_code", "unknown")),
    *(("metadata", name) for name in ("region", "", "a.b[0]", "`$`", "\n", "x" * 600)),
    ("steps", 0),
]


def _assert_settles(body: bytes) -> None:
    try:
        decoded = take(body)
    except MessageRefusedError as error:
        reason, words = error.reason, str(error)
    else:
        assert decoded.run.duration_ms >= 0
        assert len(decoded.digest) == 32
        assert len({step.index for step in decoded.run.steps}) == len(decoded.run.steps)
        assert all(len(adjustment.found) <= 200 for adjustment in decoded.adjustments)
        # The stored values are text and JSON that PostgreSQL accepts.
        stored = msgspec.json.encode(decoded.run) + msgspec.json.encode(decoded.adjustments)
        assert b"\\u0000" not in stored.replace(b"\\\\u0000", b"")
        return
    length = len(words)
    words.encode()
    assert reason in get_args(ParkReason)
    assert 0 < length <= MAX_ERROR_CHARACTERS


@settings(max_examples=1500, deadline=None, database=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4)
)
def test_flipped_inserted_and_lost_bytes_raise_only_refusals(edits: list[tuple[int, bytes, int]]):
    body = runs.body()
    for place, inserted, lost in edits:
        at = place % (len(body) + 1)
        body = body[:at] + inserted + body[at + lost :]
    _assert_settles(body)


@settings(max_examples=1500, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(_PLACES), st.sampled_from(_AWKWARD)), min_size=1, max_size=4))
def test_exchanged_values_raise_only_refusals(exchanges: list[tuple[tuple[Any, ...], Any]]):
    fields: Any = runs.message()
    for (*way, last), value in exchanges:
        # An earlier exchange may have removed the value that this one would change.
        with suppress(KeyError, IndexError, TypeError):
            part = reduce(operator.getitem, way, fields)
            if value is ...:
                del part[last]
            else:
                part[last] = deepcopy(value)
    _assert_settles(json.dumps(fields).encode())
