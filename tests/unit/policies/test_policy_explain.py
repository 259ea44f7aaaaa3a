"""The explanation of a result: the condition's parts, the values that it read, and unknown fields."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.policies.cel.clauses import Part, parts_of
from domains.policies.cel.conditions import Condition
from domains.policies.cel.field_paths import MISSING, value_at, written
from domains.policies.cel.visible import Visible
from domains.policies.explain import Answered, Explained, ask, explain, values_read
from tests.support import run_messages as runs

RUN = Visible(runs.run(usage={"cost_usd": 7.25}, metadata={"region": "eu", "a b": 1}))


def divided(text: str) -> Any:
    def split(part: Part) -> Any:
        return part.text if part.join is None else (part.join, *map(split, part.parts))

    condition = Condition(text)
    return split(parts_of(condition.text, condition.tree))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("true", "true"),
        (" ( (true) ) ", "true"),
        ("run.a && run.b && run.c", ("all", "run.a", "run.b", "run.c")),
        ("run.a || run.b && run.c", ("any", "run.a", ("all", "run.b", "run.c"))),
        ("(run.a || run.b) && !(run.c && run.d)", ("all", ("any", "run.a", "run.b"), "!(run.c && run.d)")),
        ("((run.a) && (run.b))", ("all", "run.a", "run.b")),
        ("(run.a) && (run.b)", ("all", "run.a", "run.b")),
        ("run.a ? run.b && run.c : run.d", "run.a ? run.b && run.c : run.d"),
        ("(run.a ? run.b : run.c) || run.d", ("any", "run.a ? run.b : run.c", "run.d")),
        ("run.model == 'a && b' || run.model == \"(||\"", ("any", "run.model == 'a && b'", 'run.model == "(||"')),
        ("run.model == '''a ' && ''' && true", ("all", "run.model == '''a ' && '''", "true")),
        (r"run.model == r'a\d(' && true", ("all", r"run.model == r'a\d('", "true")),
        (r"run.model == 'it\'s && ' && true", ("all", r"run.model == 'it\'s && '", "true")),
        ("run.a // && ((\n && run.b // ||", ("all", "run.a", "run.b")),
        ("run.model == '//' && run.b", ("all", "run.model == '//'", "run.b")),
        (
            "run.steps.exists(s, s.a && s.b) && size(run.steps.filter(s, s.a || s.b)) > 1",
            ("all", "run.steps.exists(s, s.a && s.b)", "size(run.steps.filter(s, s.a || s.b)) > 1"),
        ),
        (
            "[true && false, true][0] || {'a': true || false}['a']",
            ("any", "[true && false, true][0]", "{'a': true || false}['a']"),
        ),
    ],
)
def test_a_condition_is_split_at_operators_outside_brackets_and_strings(text: str, parts: Any):
    assert divided(text) == parts


def test_a_condition_is_not_split_where_its_text_and_its_tree_disagree():
    assert parts_of("run.a && run.b", Condition("run.a").tree) == Part("run.a && run.b")


ATOMS = st.sampled_from(
    [
        "true",
        "false",
        "run.nothing",
        "run.status == 'failed'",
        "run.model == ')&&('",
        "!(true && false)",
        "run.usage.cost_usd > 5.0",
        "run.steps.exists(s, s.status == 'failed' && s.index == 1)",
        "(true ? false : true)",
        "run.error_message == 'x'",
    ]
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", "||", " && ", "\n||\n", "//x &&\n&&"]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f" {text} "),
    ),
    max_leaves=12,
)


@given(CONDITIONS)
@settings(max_examples=300, deadline=None)
def test_the_clauses_combined_have_the_result_of_the_condition(text: str):
    condition = Condition(text)
    explained = explain(condition, RUN)
    assert explained.answer == ask(condition, RUN).answer
    _agrees(explained)
    outside = text.count("&&") + text.count("||")
    assert explained.join is not None or "(" in text or outside == 0


def _agrees(part: Explained) -> None:
    if part.join is None:
        assert part.parts == ()
        return
    answers = {inner.answer for inner in part.parts}
    decisive, other = ("true", "false") if part.join == "any" else ("false", "true")
    assert part.answer == (decisive if decisive in answers else "error" if "error" in answers else other)
    for inner in part.parts:
        _agrees(inner)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("run.usage.cost_usd > 5.0 && run.usage.cost_usd < 9.0", {"run.usage.cost_usd": 7.25}),
        ("run.metadata['a b'] == 1", {'run.metadata["a b"]': 1}),
        ("run['status'] == run.status", {"run.status": "failed"}),
        ("run.metadata.nothing == 1", {"run.metadata.nothing": MISSING}),
        ("has(run.metadata.region)", {"run.metadata.region": "eu"}),
        ("run.steps[1].status == 'x'", {"run.steps[1].status": "failed"}),
        ("run.steps[0].index == 0", {"run.steps[0].index": 0}),
        ("run.steps[7].status == 'x'", {"run.steps[7].status": MISSING}),
        ("run.steps[-1].status == 'x'", {"run.steps[-1].status": MISSING}),
        ("run.steps.exists(s, s.status == 'failed')", {"run.steps[].status": ["succeeded", "failed"]}),
        ("run.steps.exists(run, run.status == 'failed')", {"run.steps[].status": ["succeeded", "failed"]}),
        ("run.steps.filter(s, s.index > 0).size() > 0", {"run.steps[].index": [0, 1]}),
        ("run.steps.map(s, s.index)[0] == 0", {"run.steps[].index": [0, 1]}),
        ("run.metadata.exists(k, k == 'x')", {"run.metadata[]": ["region", "a b"]}),
        ("size(run.metadata) > 1", {"run.metadata": {"region": "eu", "a b": 1}}),
        ("[1, 2].exists(x, x == run.duration_ms)", {"run.duration_ms": 30500}),
        ("run.completed_at > timestamp('2026-11-01T00:00:00Z')", {"run.completed_at": "2026-11-01T12:00:30.500000Z"}),
        ("run.status == 'x' ? run.is_synthetic : 1 == 2", {"run.status": "failed", "run.is_synthetic": False}),
        ("{'a': run.status}['a'] == [run.model][0]", {"run.status": "failed", "run.model": "gpt-4o"}),
        ("true", {}),
    ],
)  # fmt: skip
def test_each_value_that_a_condition_read_is_listed_once(text: str, values: dict[str, Any]):
    found = {
        value.path: MISSING if value.state == "missing" else value.value for value in values_read(Condition(text), RUN)
    }
    assert found == values


def test_a_list_whose_elements_are_not_read_is_listed_itself():
    (value,) = values_read(Condition("run.steps.all(s, true)"), RUN)
    assert value.path == "run.steps"
    assert value.value == RUN.fields["steps"]


def test_a_path_is_written_as_in_a_condition():
    assert written(("metadata", "a b", 0, None, "x")) == 'run.metadata["a b"][0][].x'
    assert value_at({"a": "text"}, ("a", 0)) is MISSING
    assert value_at({"a": [{"b": 1}, {}]}, ("a", None, "b")) == [1, None]


UNKNOWN = frozenset({"steps", "error_message"})
HALF_KNOWN = Visible(runs.run(steps=[], error_message=None), unknown=UNKNOWN)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("run.status == 'failed'", "true"),
        ("run.status == 'failed' || run.error_message == 'x'", "true"),
        ("run.status == 'x' && run.steps.exists(s, s.index == 0)", "false"),
        ("run.status == 'failed' && run.error_message == 'x'", "unknown"),
        ("size(run.steps) == 0", "unknown"),
        ("has(run.steps)", "unknown"),
        ("size(run) > 1", "unknown"),
        ("'steps' in run", "unknown"),
        ("dyn(run).steps == []", "unknown"),
        ("run.exists(name, name == 'steps')", "unknown"),
        ("run.metadata.nothing == 1", "error"),
        ("run.nothing == 1 || run.steps == []", "unknown"),
    ],
)
def test_a_condition_has_no_result_only_if_it_depends_on_an_unknown_field(text, answer):
    assert ask(Condition(text), HALF_KNOWN).answer == answer


def test_an_unknown_result_names_the_fields_that_are_not_stored():
    condition = Condition("run.steps == [] && run.status == 'failed'")
    assert ask(condition, HALF_KNOWN) == Answered("unknown", "not stored: steps")
    assert [(value.path, value.state) for value in values_read(condition, HALF_KNOWN)] == [
        ("run.steps", "unknown"),
        ("run.status", "known"),
    ]


HALF_KNOWN_ATOMS = st.sampled_from(
    [
        "true",
        "false",
        "run.nothing",
        "run.status == 'failed'",
        "run.error_message == 'x'",
        "has(run.error_message)",
        "run.error_message != null",
        "run.steps.exists(s, s.index == 0)",
        "run.steps.all(s, s.index == 0)",
        "size(run.steps) > 0",
        "run.steps[0].status == 'failed'",
        "'steps' in run",
        "(run.error_message == 'x' ? true : run.is_synthetic)",
    ]
)


@given(
    st.recursive(
        HALF_KNOWN_ATOMS,
        lambda inner: st.one_of(
            st.tuples(st.just("("), inner, st.sampled_from(["&&", "||"]), inner, st.just(")")).map("".join),
            inner.map(lambda text: f"!({text})"),
        ),
        max_leaves=8,
    ),
    st.sampled_from([None, "x", "other"]),
    st.integers(0, 2),
)
@settings(max_examples=400, deadline=None)
def test_a_result_on_a_partly_known_run_is_the_result_on_the_complete_run(text, error_message, steps):
    half = ask(Condition(text), HALF_KNOWN).answer
    complete = Visible(
        runs.run(error_message=error_message, steps=[{"index": n, "status": "failed"} for n in range(steps)])
    )
    assert half in {"unknown", ask(Condition(text), complete).answer}
