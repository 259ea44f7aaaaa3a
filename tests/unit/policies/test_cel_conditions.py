"""Conditions: which compile, the form of a run in them, and the cost of an evaluation."""

import subprocess
import sys
from contextlib import suppress
from time import process_time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.policies.cel.conditions import CONDITION_MAX, Condition, ConditionError, EvaluationError
from domains.policies.cel.visible import VISIBLE_MAX, Visible, visible_fields
from domains.run import VISIBLE_STEPS, CompletedRun, Usage
from tests.support import run_messages as runs

# CPU seconds that the worst condition may take on the worst run; other programs on the machine do not count.
WORST_SECONDS = 2.0
# Wall-clock seconds after which an evaluation counts as hung.
HUNG_SECONDS = 30.0


def holds(text: str, **changes: Any) -> bool:
    return Condition(text).holds(Visible(runs.run(**changes)))


def failure(text: str, **changes: Any) -> str:
    condition = Condition(text)
    with pytest.raises(EvaluationError) as caught:
        condition.holds(Visible(runs.run(**changes)))
    return str(caught.value)


def largest_run() -> CompletedRun:
    """A thousand steps and an error message of a megabyte."""
    steps = [{"index": n, "skill": "a" * 500, "status": "failed", "duration_ms": n} for n in range(1000)]
    metadata = {f"key-{n}": "a" * VISIBLE_MAX for n in range(64)}
    return runs.run(error_message="a" * 1_048_576, steps=steps, metadata=metadata)


@pytest.mark.parametrize(
    "text",
    [
        'run.status == "failed" && run.error_code == "EXECUTION_TIMEOUT"',
        "run.duration_ms == 30500",
        "run.usage.cost_usd == 0.0125 && run.usage.input_tokens == 1200",
        'run.steps.exists(step, step.status == "failed" && step.skill == "book")',
        "size(run.steps) == 2 && run.steps[0].cost_usd < 0.02 && run.steps[1].cost_usd == null",
        'run.metadata.region == "eu" && run.metadata["retries"] == 2',
        'timestamp(run.completed_at) - timestamp(run.started_at) == duration("30.5s")',
        'run.error_message.matches("no answer within [0-9]+ s")',
        'run.tenant_id == "acme" && size(run.run_id) == 36 && size(run.trace_id) == 36',
        "run.is_synthetic == false && run.synthetic_scenario_id == null && run.schema_version == 1",
        'has(run.model) && !has(run.metadata.nope) && !("nope" in run.metadata)',
    ],
)
def test_a_condition_can_read_every_field_of_the_message(text: str):
    assert holds(text) is True
    assert holds(f"!({text})") is False


def test_an_omitted_field_has_its_default_in_a_condition():
    optional = ("agent_id", "error_code", "error_message", "trace_id", "model", "usage", "steps", "metadata")
    short = runs.run(**dict.fromkeys(optional, ...))
    for run in (short, runs.run()):
        assert set(visible_fields(run)) == {*CompletedRun.__struct_fields__, "duration_ms", "step_count"}
        assert set(visible_fields(run)["usage"]) == set(Usage.__struct_fields__)


@pytest.mark.parametrize(
    ("text", "line", "column", "what"),
    [
        ("nope == 1", 1, 1, "undeclared reference to 'nope' (in container '')"),
        ('run.status == "x" &&\n  nope', 2, 3, "undeclared reference to 'nope' (in container '')"),
        ('"ä😀" == nope', 1, 9, "undeclared reference to 'nope' (in container '')"),
        ("true\x00", 1, 5, "Syntax error: token recognition error at: '"),
        ("true && ä", 1, 9, "Syntax error: token recognition error at: 'ä'"),
        ("1", 1, 1, "the condition returns int; expected true or false"),
        ('"yes"', 1, 1, "the condition returns string; expected true or false"),
        ("null", 1, 1, "the condition returns null; expected true or false"),
        ("size(run)", 1, 1, "the condition returns int; expected true or false"),
        ("x" * (CONDITION_MAX + 1), 1, 1, "4097 characters; expected at most 4096"),
    ],
)
def test_a_condition_that_does_not_compile_is_refused_with_line_and_column(
    text: str, line: int, column: int, what: str
):
    with pytest.raises(ConditionError) as caught:
        Condition(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value) == f"line {line}, column {column}: {what}"


@pytest.mark.parametrize(
    ("text", "place"), [("run.status ==", (1, 14)), ("(\ntrue", (2, 5)), ("", (1, 1)), ("a b", (1, 3))]
)
def test_a_syntax_error_has_line_and_column(text: str, place: tuple[int, int]):
    with pytest.raises(ConditionError, match="Syntax error") as caught:
        Condition(text)
    assert (caught.value.line, caught.value.column) == place


@pytest.mark.parametrize(
    "text",
    [
        "(" * 2000 + "true" + ")" * 2000,
        "[" * 4000,
        "true" + " && true" * 500,
        "!" * 4000 + "true",
        "-" * 4095 + "1",
        "run" + ".a" * 2000,
        "true ? " * 500 + "true" + " : true" * 500,
        '"' + "\\" * 4000,
        '"\ud800" == run.status',
        "\ufeff true",
        "\x00" * 100,
        "google.protobuf.Any{}",
        "run.steps.all(a, " * 100 + "true" + ")" * 100,
    ],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_hostile_text_compiles_or_raises_a_condition_error(text: str):
    try:
        condition = Condition(text)
    except ConditionError as error:
        refused = str(error)
        assert len(refused) < 400
        assert "\n" not in refused
        return
    try:
        condition.holds(Visible(runs.run()))
    except EvaluationError:
        return


def test_text_that_is_not_unicode_is_refused_with_a_readable_error():
    with pytest.raises(ConditionError) as caught:
        Condition('run.status == "\ud800"')
    assert "incompatible function arguments" not in str(caught.value)
    assert "0x" not in str(caught.value)


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(alphabet=st.sampled_from("run.status=&|!()[]{}\"'0123456789-+*/%<>?:, \n\\maptrue\x00ä😀"), max_size=60))
def test_any_invalid_text_raises_a_condition_error(text: str):
    try:
        condition = Condition(text)
    except ConditionError:
        return
    try:
        condition.holds(Visible(runs.run()))
    except EvaluationError:
        return


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("run.status", "string"),
        ("run.agent_id", "null"),
        ("run.duration_ms", "int"),
        ("run.usage.cost_usd", "double"),
        ("run.metadata", "map<dyn, dyn>"),
        ("run.steps", "list<dyn>"),
        ("dyn(timestamp(run.started_at))", "timestamp"),
        ('dyn(duration("1s"))', "duration"),
        ('dyn(b"x")', "bytes"),
        ("dyn(1u)", "uint"),
        ("dyn(type(run))", "type"),
    ],
)
def test_a_result_other_than_true_or_false_is_an_evaluation_error(text: str, kind: str):
    assert failure(text, agent_id=None) == f"the condition returned {kind}; expected true or false"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run.metadata.nope == 1", 'Key not found in map : "nope"'),
        ("run.nope", 'Key not found in map : "nope"'),
        ("run.steps[2].index == 2", "Index error: index=2 size=2"),
        ("run.duration_ms / 0 == 1", "divide by zero"),
        ("run.agent_id > 5", "No matching overloads"),
        ('run.status.matches("(")', "invalid regular expression"),
        ("9223372036854775807 + run.duration_ms > 0", "overflow"),
        ('timestamp("9999-12-31T23:59:59Z") + duration("100h") > timestamp(run.started_at)', "overflow"),
        ('timestamp(run.status) > timestamp("2026-01-01T00:00:00Z")', "timestamp"),
    ],
)
def test_a_condition_without_a_result_raises_with_the_reason(text: str, words: str):
    assert words.lower() in failure(text).lower()


def test_an_exceeded_iteration_budget_is_an_evaluation_error():
    steps = [{"index": n, "status": "failed"} for n in range(1000)]
    words = failure("run.steps.all(a, run.steps.all(b, a.index != b.index + 5000))", steps=steps)
    assert "iteration" in words.lower()
    assert "\n" not in words


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**300, 10**308, -(10**309), 10**1000])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=20)
)


@settings(max_examples=200, deadline=None, database=None)
@given(
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=10), _SCALARS, max_size=8
    )
)
def test_a_condition_can_read_every_scalar_in_the_metadata(metadata: dict[str, Any]):
    run = msgspec.structs.replace(runs.run(metadata={}), metadata=metadata)
    visible = Visible(run)
    assert Condition(f"size(run.metadata) == {len(metadata)}").holds(visible)
    assert Condition("run.metadata.all(key, run.metadata[key] == null || type(run.metadata[key]) != null_type)").holds(
        visible
    )


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400, -(10**400)])
def test_an_integer_beyond_64_bits_is_compared_as_a_double(number: int):
    run = msgspec.structs.replace(runs.run(), metadata={"n": number})
    sign = ">" if number > 0 else "<"
    assert Condition(f"run.metadata.n {sign} 0.0 && type(run.metadata.n) == double").holds(Visible(run))


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 0])
def test_an_integer_of_64_bits_stays_exact(number: int):
    text = "-9223372036854775808" if number == -(2**63) else str(number)
    assert holds(f"run.metadata.n == {text} && type(run.metadata.n) == int", metadata={"n": number})


@settings(max_examples=100, deadline=None, database=None)
@given(
    cost=st.decimals(0, 10**11, allow_nan=False),
    times=st.tuples(st.datetimes(), st.datetimes()).map(sorted),
    text=st.none() | st.text(max_size=50),
)
def test_every_valid_run_can_be_converted(cost: Any, times: Any, text: str | None):
    run = runs.run(
        usage={"cost_usd": str(cost), "input_tokens": 2**63 - 1, "output_tokens": 0},
        started_at=times[0].isoformat() + "Z",
        completed_at=times[1].isoformat() + "Z",
        error_message=text,
        model=text,
        agent_id=text,
        steps=[{"index": 2**31 - 1, "skill": text, "status": "skipped", "cost_usd": str(cost)}],
    )
    assert Condition(
        "run.usage.cost_usd >= 0.0 && run.duration_ms >= 0 && run.steps[0].cost_usd == run.usage.cost_usd"
    ).holds(Visible(run))


def test_a_long_text_is_cut_to_the_visible_maximum():
    fields = visible_fields(runs.run(error_message="ä" * (VISIBLE_MAX + 1)))
    assert fields["error_message"] == "ä" * VISIBLE_MAX
    assert visible_fields(runs.run(error_message="ä" * VISIBLE_MAX))["error_message"] == "ä" * VISIBLE_MAX


LONG = "x" * VISIBLE_MAX + "needle"
MANY = [{"index": n, "status": "failed", "skill": f"s{n}"} for n in range(VISIBLE_STEPS + 5)]
PARTLY_SEEN = [
    (
        "run.error_message.contains('needle')",
        {"error_message": LONG},
        "only the first 4,096 characters of error_message",
    ),
    (
        "run.metadata.note.contains('needle')",
        {"metadata": {"note": LONG}},
        "only the first 4,096 characters of metadata",
    ),
    (
        "run.metadata.a.b[0].contains('needle')",
        {"metadata": {"a": {"b": [LONG]}}},
        "only the first 4,096 characters of metadata",
    ),
    (
        "run.steps.exists(s, s.skill.contains('needle'))",
        {"steps": [{"index": 0, "status": "failed", "skill": LONG}]},
        "only the first 4,096 characters of steps",
    ),
    ("run.steps.exists(s, s.skill == 's1004')", {"steps": MANY}, "5 of its 1,005 steps"),
    ("size(run.steps) > 1000", {"steps": MANY}, "5 of its 1,005 steps"),
]


@pytest.mark.parametrize(("text", "changes", "unseen"), PARTLY_SEEN, ids=lambda value: str(value)[:40])
def test_a_condition_that_is_not_true_of_the_visible_part_is_an_evaluation_error(text, changes, unseen):
    with pytest.raises(
        EvaluationError, match=f"not true of what conditions see, but {unseen} were not seen|{unseen} were seen"
    ):
        Condition(text).holds(Visible(runs.run(**changes)))


def test_a_condition_that_is_true_of_the_visible_part_or_reads_no_truncated_value_has_its_result():
    run = Visible(runs.run(error_message=LONG, steps=MANY, metadata={"note": LONG, "region": "eu"}))
    assert Condition("run.error_message.startsWith('x')").holds(run)
    assert Condition("run.steps.exists(s, s.skill == 's999')").holds(run)
    assert Condition("run.step_count == 1005").holds(run)
    assert not Condition("run.metadata.region == 'us'").holds(run)
    assert not Condition("run.status == 'succeeded'").holds(run)


def test_texts_in_steps_and_metadata_are_cut_to_the_visible_maximum():
    long = "x" * (VISIBLE_MAX + 1)
    steps = [{"index": 0, "status": "failed", "skill": long}]
    fields = visible_fields(runs.run(steps=steps, metadata={"value": long, long: 1}))
    assert fields["steps"][0]["skill"] == long[:-1]
    assert fields["metadata"] == {"value": long[:-1], long[:-1]: 1}


NASTY = [
    'run.error_message.matches("(a*)*(a*)*(a*)*b$")',
    'run.error_message.matches("(a|aa){1,50}b")',
    'run.steps.all(step, !run.error_message.matches("(.*a){20}b"))',
    "run.steps.all(a, run.steps.all(b, a.index * b.index >= 0))",
    "run.steps.map(a, run.steps.map(b, a)).size() > 0",
    'run.metadata.all(a, run.metadata.all(b, !run.metadata[a].matches("(.*a){10}b") || run.metadata[b] == a))',
    "run.steps.all(s, run.error_message + run.error_message + run.error_message != s.skill)",
    "run.steps.map(s, run.error_message + s.skill).map(t, t + t + t + t).all(t, size(t) > 0)",
    "size(" + "run.error_message + " * 20 + '"") > 0',
    'run.steps.all(s, !run.error_message.contains("' + "a" * 2000 + 'b"))',
]


@pytest.mark.parametrize("text", NASTY, ids=lambda text: text[:40])
def test_an_expensive_condition_on_the_largest_run_ends_in_time(text: str):
    run = largest_run()
    started = process_time()
    with suppress(ConditionError, EvaluationError):
        Condition(text).holds(Visible(run))
    assert process_time() - started < WORST_SECONDS


@pytest.mark.parametrize(
    "text",
    [
        'run.steps.exists(s, s.skill.matches("((a{1,30}){1,30})b"))',
        'run.steps.all(s, [1, 2, 3, 4, 5, 6, 7, 8].all(n, !s.skill.matches("^(a?){100}a{400}b$")))',
    ],
)
def test_a_pattern_that_is_expensive_to_compile_ends_in_time(text: str):
    # In a separate process: an evaluation cannot be interrupted, and this one may take a minute.
    program = f"""
from time import process_time
from domains.policies.cel.conditions import Condition, EvaluationError, ConditionError
from domains.policies.cel.visible import Visible
from tests.support import run_messages as runs
started = process_time()
try:
    condition = Condition({text!r})
    condition.holds(Visible(runs.run(steps=[
        {{"index": n, "skill": "a" * 900, "status": "failed"}} for n in range(1000)
    ])))
except (ConditionError, EvaluationError):
    pass
print(process_time() - started)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=HUNG_SECONDS)
    assert float(done.stdout) < WORST_SECONDS
