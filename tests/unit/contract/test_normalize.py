"""A value is accepted in any spelling; each value that is changed, truncated or dropped is recorded."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from time import process_time
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import pytest

from consumer.contract.names import ADJUSTABLE_FIELDS
from consumer.contract.run_message import Decoded, decode
from domains.run import CompletedRun
from tests.support import run_messages as runs

MAX_BYTES = 1_048_576
RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"


def take(body: bytes) -> Decoded:
    return decode(body, max_bytes=MAX_BYTES)


def step(**changes: Any) -> dict[str, Any]:
    fields = {"index": 0, "status": "failed", **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def value_of(run: CompletedRun, path: str) -> Any:
    value: Any = run
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def derived(tenant: str, text: str) -> UUID:
    return uuid5(uuid5(NAMESPACE_URL, f"urn:closeout:{tenant}"), text)


# Another spelling of the same value: the changes, where the value is, and the value; nothing is adjusted.
SPELLINGS: list[tuple[dict[str, Any], str, Any]] = [
    ({"schema_version": 1.0}, "schema_version", 1),
    ({"tenant_id": 42}, "tenant_id", "42"),
    ({"tenant_id": 42.0}, "tenant_id", "42"),
    *(
        ({"run_id": spelled}, "run_id", UUID(RUN_ID))
        for spelled in (
            RUN_ID.upper(),
            RUN_ID.replace("-", ""),
            f"{{{RUN_ID}}}",
            f"{{{RUN_ID.upper()}}}",
            f"urn:uuid:{RUN_ID}",
            f"URN:UUID:{RUN_ID.upper()}",
        )
    ),
    ({"run_id": "01JDMV7Z1W2M6Q0B7Y6R2J9T5X"}, "run_id", derived("acme", "01JDMV7Z1W2M6Q0B7Y6R2J9T5X")),
    ({"run_id": "01JDMV7Z1W2M6Q0B7Y6R2J9T5X"}, "run_ref", "01JDMV7Z1W2M6Q0B7Y6R2J9T5X"),
    ({"run_id": "!" * 200}, "run_ref", "!" * 200),
    ({"run_id": 17}, "run_ref", "17"),
    ({"run_id": RUN_ID}, "run_ref", None),
    ({"run_ref": "not a field of the message"}, "run_ref", None),
    *(({"status": spelled}, "status", "failed") for spelled in ("FAILED", "Failed")),
    ({"started_at": "2016-12-31T23:59:60Z"}, "started_at", datetime(2017, 1, 1, tzinfo=UTC)),
    ({"started_at": "2016-12-31T18:59:60.25-05:00"}, "started_at", datetime(2017, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC)),
    ({"started_at": "2026-11-01 12:00:00z"}, "started_at", datetime(2026, 11, 1, 12, tzinfo=UTC)),
    ({"agent_id": 7}, "agent_id", "7"),
    ({"model": 3.50}, "model", "3.5"),
    ({"synthetic_scenario_id": 7}, "synthetic_scenario_id", "7"),
    ({"session_id": 7}, "session_id", "7"),
    ({"parent_run_id": RUN_ID.upper()}, "parent_run_id", RUN_ID),
    ({"parent_run_id": f"urn:uuid:{RUN_ID}"}, "parent_run_id", RUN_ID),
    ({"trace_id": RUN_ID.replace("-", "")}, "trace_id", UUID(RUN_ID)),
    ({"trace_id": RUN_ID.upper()}, "trace_id", UUID(RUN_ID)),
    ({"usage": {"input_tokens": 1200.0}}, "usage.input_tokens", 1200),
    ({"usage": {"input_tokens": "1200"}}, "usage.input_tokens", 1200),
    ({"usage": {"input_tokens": "1.2e3"}}, "usage.input_tokens", 1200),
    ({"usage": {"cached_input_tokens": "7"}}, "usage.cached_input_tokens", 7),
    ({"usage": {"cost_usd": " 0.5 "}}, "usage.cost_usd", Decimal("0.5")),
    ({"usage": {"cost_usd": "1e-41"}}, "usage.cost_usd", Decimal(0)),
    ({"steps": [step(index=0), step(index=0), step(index=1)]}, "steps.2.index", 2),
    ({"steps": [step(index="3")]}, "steps.0.index", 3),
    ({"steps": [step(index=...), step(index=...)]}, "steps.1.index", 1),
    ({"steps": [step(index=1), step(index=None)]}, "steps.1.index", 2),
    ({"steps": [step(status="SKIPPED")]}, "steps.0.status", "skipped"),
    ({"steps": [step(status=...)]}, "steps.0.status", "unknown"),
    ({"steps": [step(duration_ms=12.5)]}, "steps.0.duration_ms", 12.5),
    ({"steps": [step(duration_ms="12")]}, "steps.0.duration_ms", 12),
    ({"steps": [step(skill=5)]}, "steps.0.skill", "5"),
    ({"steps": [step(input_tokens="5", output_tokens=6.0)]}, "steps.0.output_tokens", 6),
    ({"steps": [step(started_at="2016-12-31T23:59:60Z")]}, "steps.0.started_at", datetime(2017, 1, 1, tzinfo=UTC)),
    *(({name: None}, name, held) for name, held in (("steps", ()), ("metadata", {}), ("is_synthetic", False))),
    ({"usage": None}, "usage.cost_usd", None),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "path", "held"), SPELLINGS, ids=lambda value: str(value)[:50])
def test_another_spelling_of_a_value_is_read_as_that_value(changes: dict[str, Any], path: str, held: Any):
    decoded = take(runs.body(**changes))
    assert (value_of(decoded.run, path), decoded.adjustments) == (held, ())


# A value that has another meaning: the changes, where the value is, the value, and the adjustment's field and text.
CHANGED: list[tuple[dict[str, Any], str, Any, str]] = [
    ({"agent_id": "a" * 1_025}, "agent_id", "a" * 1_024, "a" * 199 + "…"),
    ({"agent_id": ["a"]}, "agent_id", None, '["a"]'),
    ({"model": True}, "model", None, "true"),
    ({"model": "a\x00b"}, "model", "ab", "a\\u0000b"),
    ({"synthetic_scenario_id": {}}, "synthetic_scenario_id", None, "{}"),
    ({"parent_run_id": []}, "parent_run_id", None, "[]"),
    ({"session_id": "s" * 2_000}, "session_id", "s" * 1_024, "s" * 199 + "…"),
    ({"error_code": "openai.RateLimitError"}, "error_code", "OPENAI_RATELIMITERROR", "openai.RateLimitError"),
    ({"error_code": "step_failure"}, "error_code", "STEP_FAILURE", "step_failure"),
    ({"error_code": "x" * 65}, "error_code", "X" * 64, "x" * 65),
    ({"error_code": 404}, "error_code", "E_404", "404"),
    ({"error_code": "_X"}, "error_code", "E__X", "_X"),
    ({"error_code": "größe"}, "error_code", "GR__E", "größe"),
    ({"error_code": ""}, "error_code", None, ""),
    ({"error_code": ["A"]}, "error_code", None, '["A"]'),
    ({"error_message": "a\x00b"}, "error_message", "ab", "a\\u0000b"),
    ({"error_message": "a\ud800b"}, "error_message", "a\ufffdb", "a\\ud800b"),
    ({"error_message": {"code": 5}}, "error_message", None, '{"code": 5}'),
    ({"trace_id": "trace-7"}, "trace_id", derived("acme", "trace-7"), "trace-7"),
    ({"trace_id": ""}, "trace_id", None, ""),
    ({"trace_id": []}, "trace_id", None, "[]"),
    ({"usage": 5}, "usage.cost_usd", None, "5"),
    ({"usage": {"cost_usd": -0.01}}, "usage.cost_usd", None, ".cost_usd: -0.01"),
    ({"usage": {"cost_usd": 10**12}}, "usage.cost_usd", None, ".cost_usd: 1000000000000"),
    ({"usage": {"cost_usd": "NaN"}}, "usage.cost_usd", None, ".cost_usd: NaN"),
    ({"usage": {"cost_usd": "a lot"}}, "usage.cost_usd", None, ".cost_usd: a lot"),
    ({"usage": {"cost_usd": True}}, "usage.cost_usd", None, ".cost_usd: true"),
    ({"usage": {"input_tokens": -1}}, "usage.input_tokens", None, ".input_tokens: -1"),
    ({"usage": {"input_tokens": 2**63}}, "usage.input_tokens", None, ".input_tokens: 9223372036854775808"),
    ({"usage": {"output_tokens": 1.5}}, "usage.output_tokens", None, ".output_tokens: 1.5"),
    ({"usage": {"output_tokens": "many"}}, "usage.output_tokens", None, ".output_tokens: many"),
    ({"steps": "none"}, "steps", (), "none"),
    ({"steps": [step(index=-1)]}, "steps.0.index", 0, "[0].index: -1"),
    ({"steps": [step(index=2**31)]}, "steps.0.index", 0, "[0].index: 2147483648"),
    ({"steps": [step(status="timed_out")]}, "steps.0.status", "unknown", "[0].status: timed_out"),
    ({"steps": [step(duration_ms=-1)]}, "steps.0.duration_ms", None, "[0].duration_ms: -1"),
    ({"steps": [step(cost_usd=-1)]}, "steps.0.cost_usd", None, "[0].cost_usd: -1"),
    ({"steps": [step(error_code="x")]}, "steps.0.error_code", "X", "[0].error_code: x"),
    ({"steps": [step(started_at="noon")]}, "steps.0.started_at", None, "[0].started_at: noon"),
    ({"steps": [step(), 5]}, "steps.0.index", 0, "[1]: 5"),
    ({"is_synthetic": "true"}, "is_synthetic", False, "true"),
    ({"is_synthetic": 1}, "is_synthetic", False, "1"),
    ({"metadata": [1]}, "metadata", {}, "[1]"),
    ({"metadata": {"a": "x\x00y", "b": 1}}, "metadata", {"a": "xy", "b": 1}, ".a: x\\u0000y"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "path", "held", "found"), CHANGED, ids=lambda value: str(value)[:50])
def test_a_value_with_another_meaning_is_changed_and_recorded(
    changes: dict[str, Any], path: str, held: Any, found: str
):
    decoded = take(runs.body(**changes))
    (field,) = changes
    assert value_of(decoded.run, path) == held
    assert [(adjustment.field, adjustment.found) for adjustment in decoded.adjustments] == [(field, found)]
    assert field in ADJUSTABLE_FIELDS


def test_an_invalid_optional_field_leaves_all_others_unchanged():
    fields = runs.message(model=[1])
    assert take(json.dumps(fields).encode()).run == take(json.dumps({**fields, "model": None}).encode()).run


def test_ten_thousand_steps_are_stored_and_more_are_cut():
    steps = [step(index=index) for index in range(10_001)]
    assert take(runs.body(steps=steps[:10_000])).adjustments == ()
    decoded = take(runs.body(steps=steps))
    assert len(decoded.run.steps) == 10_000
    assert [(a.field, a.found, a.stored) for a in decoded.adjustments] == [
        ("steps", "10001 steps", "the first 10000")
    ]  # fmt: skip


def nested(levels: int) -> dict[str, Any]:
    """Metadata of *levels* objects, each in the one before."""
    value: dict[str, Any] = {"k": 1}
    for _ in range(levels - 1):
        value = {"k": value}
    return value


def depth_of(value: Any) -> int:
    return 1 + depth_of(next(iter(value.values()), 0)) if isinstance(value, dict) else 0


def test_metadata_is_kept_up_to_a_thousand_values_and_sixteen_levels():
    assert take(runs.body(metadata=nested(16))).adjustments == ()
    deeper = take(runs.body(metadata=nested(17)))
    assert (depth_of(deeper.run.metadata), [a.field for a in deeper.adjustments]) == (16, ["metadata"])
    lists = {str(n): [n] * 25 for n in range(40)}
    assert take(runs.body(metadata=lists)).run.metadata == lists
    more = take(runs.body(metadata={**lists, "last": 5}))
    assert (more.run.metadata, [a.found for a in more.adjustments]) == (lists, [".last: 5"])


@pytest.mark.parametrize("raw", ["1e400", "-1e400", "1e99999999999", "9" * 5_000])
def test_a_number_that_no_double_can_hold_is_dropped_from_the_metadata(raw: str):
    body = runs.body(metadata={"huge": "MARK", "fine": 0.5}).replace(b'"MARK"', raw.encode())
    decoded = take(body)
    assert (decoded.run.metadata, [a.field for a in decoded.adjustments]) == ({"fine": 0.5}, ["metadata"])


@pytest.mark.parametrize("field", ["metadata", "unknown"])
def test_any_depth_of_nesting_is_read_and_costs_no_more_than_its_bytes(field: str):
    levels = 100_000
    body = runs.body(**{field: {"a": "MARK", "b": 1}}).replace(b'"MARK"', b'{"k":[' * levels + b"]}" * levels)
    started = process_time()
    decoded = take(body)
    assert process_time() - started < 5
    assert [a.field for a in decoded.adjustments] == (["metadata"] if field == "metadata" else [])


def test_an_unpaired_surrogate_is_replaced_everywhere():
    decoded = take(runs.body(agent_id="\ud800", metadata={"\udc00": "\ud800\udc00\ud800"}))
    assert (decoded.run.agent_id, decoded.run.metadata) == ("\ufffd", {"\ufffd": "\U00010000\ufffd"})


def test_the_list_of_adjustments_is_bounded():
    steps = [step(index=-1, status="?", cost_usd="x") for _ in range(10_000)]
    started = process_time()
    decoded = take(runs.body(steps=steps))
    assert process_time() - started < 5
    assert len(decoded.adjustments) == 51
    assert decoded.adjustments[-1].found == "29950 more values were adjusted"


def test_the_derived_id_of_a_text_differs_between_tenants():
    ids = {take(runs.body(tenant_id=tenant, run_id="run-1")).run.run_id for tenant in ("acme", "globex")}
    assert ids == {derived("acme", "run-1"), derived("globex", "run-1")}
