"""Policy files are read completely, or refused with every fault and its line."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.policies.files import FILE_MAX, PolicyDraft, PolicyFileError, read_policies

NO_LIST = "expected a list of policies, or an object with a list named policies"
FIELDS = "name, tenant_id, effect, severity, condition, mode, enabled"
MISSING_NAME = "name: missing; expected 1 to 128 letters, digits, spaces and . _ -"
MISSING_EFFECT = "effect: missing; expected flag or suppress_incident"
MISSING_SEVERITY = "severity: missing; expected one of NONE, LOW, MEDIUM, HIGH, CRITICAL"
MISSING_CONDITION = "condition: missing; expected a CEL expression on run, in quotes or a block"


def read(text: str) -> list[PolicyDraft]:
    return read_policies(text, source="rules.yaml")


def faults(text: str) -> list[str]:
    with pytest.raises(PolicyFileError) as caught:
        read(text)
    return str(caught.value).splitlines()


def one(**changes: str | None) -> str:
    """A file of one policy; each value is written unmodified."""
    fields: dict[str, str | None] = {"name": "slow", "effect": "flag", "severity": "LOW", "condition": '"true"'}
    lines = [f"{name}: {value}" for name, value in {**fields, **changes}.items() if value is not None]
    return "- " + "\n  ".join(lines) + "\n"


def test_a_list_of_policies_is_read():
    text = """
# Ours
- name: Slow runs
  tenant_id: acme
  effect: flag
  severity: HIGH
  condition: run.duration_ms > 60000
  enabled: false
- name: quiet
  effect: suppress_incident
  severity: NONE
  condition: |
    run.is_synthetic
    && run.status == "failed"
"""
    assert read(text) == [
        PolicyDraft(
            name="Slow runs",
            tenant_id="acme",
            effect="flag",
            severity="HIGH",
            condition="run.duration_ms > 60000",
            enabled=False,
        ),
        PolicyDraft(
            name="quiet",
            tenant_id=None,
            effect="suppress_incident",
            severity="NONE",
            condition='run.is_synthetic\n&& run.status == "failed"\n',
            enabled=True,
        ),
    ]


def test_an_object_with_a_list_of_policies_is_read():
    assert read("version: 1\npolicies:\n" + one()) == read(one())


@pytest.mark.parametrize("text", ["[]", "policies: []"])
def test_an_empty_list_is_valid(text: str):
    assert read(text) == []


POLICY: dict[str, Any] = {
    "name": "smile",
    "tenant_id": None,
    "effect": "flag",
    "severity": "LOW",
    "condition": 'run.agent_id == "\U0001f600"',
    "enabled": True,
}


@pytest.mark.parametrize("indent", [None, 2, "\t"], ids=["one line", "spaces", "tabs"])
@pytest.mark.parametrize("ensure_ascii", [True, False], ids=["escaped", "plain"])
@pytest.mark.parametrize("document", [[POLICY], {"policies": [POLICY]}], ids=["list", "object"])
def test_json_is_read_in_every_layout(document: Any, *, indent: Any, ensure_ascii: bool):
    assert read(json.dumps(document, indent=indent, ensure_ascii=ensure_ascii)) == [PolicyDraft(**POLICY)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": None}, f"rules.yaml:1: {MISSING_NAME}"),
        ({"name": '""'}, "rules.yaml:1: name: found ''; expected 1 to 128 letters, digits, spaces and . _ -"),
        ({"name": "5"}, "rules.yaml:1: name: found 5; expected 1 to 128 letters, digits, spaces and . _ -"),
        ({"name": "a/b"}, "rules.yaml:1: name: found 'a/b'; expected 1 to 128 letters, digits, spaces and . _ -"),
        ({"name": '"a\\n"'}, "rules.yaml:1: name: found 'a\\n'; expected 1 to 128 letters, digits, spaces and . _ -"),
        ({"effect": None}, f"rules.yaml:1: {MISSING_EFFECT}"),
        ({"effect": "block"}, "rules.yaml:2: effect: found 'block'; expected flag or suppress_incident"),
        ({"effect": "[flag]"}, "rules.yaml:2: effect: found a list; expected flag or suppress_incident"),
        ({"severity": None}, f"rules.yaml:1: {MISSING_SEVERITY}"),
        (
            {"severity": "low"},
            "rules.yaml:3: severity: found 'low'; expected one of NONE, LOW, MEDIUM, HIGH, CRITICAL",
        ),
        (
            {"severity": "null"},
            "rules.yaml:3: severity: found null; expected one of NONE, LOW, MEDIUM, HIGH, CRITICAL",
        ),
        ({"condition": None}, f"rules.yaml:1: {MISSING_CONDITION}"),
        (
            {"condition": "true"},
            "rules.yaml:4: condition: found true; expected a CEL expression on run, in quotes or a block",
        ),
        ({"tenant_id": "5"}, "rules.yaml:5: tenant_id: found 5; expected a tenant's id, or null for all tenants"),
        ({"tenant_id": "a b"}, "rules.yaml:5: tenant_id: found 'a b'; expected a tenant's id, or null for all tenants"),
        ({"tenant_id": '""'}, "rules.yaml:5: tenant_id: found ''; expected a tenant's id, or null for all tenants"),
        ({"enabled": "1"}, "rules.yaml:5: enabled: found 1; expected true or false"),
        ({"enabled": '"true"'}, "rules.yaml:5: enabled: found 'true'; expected true or false"),
        ({"enabled": "2026-01-01"}, "rules.yaml:5: enabled: found 2026-01-01; expected true or false"),
        ({"severty": "LOW"}, f"rules.yaml:5: severty: not a field of a policy; expected {FIELDS}"),
        ({"? 5": "\n  : 6"}, f"rules.yaml:5: 5: not a field of a policy; expected {FIELDS}"),
    ],
    ids=str,
)
def test_an_invalid_field_is_reported_with_its_line_the_value_found_and_the_values_expected(
    changes: dict[str, str | None], words: str
):
    text = one(**changes).replace("? 5: \n", "? 5\n")
    assert faults(text) == [words]


def test_all_faults_are_reported_together():
    text = """\
- name: fine
  effect: flag
  severity: LOW
  condition: "true"
- name: ""
  effect: warn
  condition: nope == 1
  colour: red
- 5
- name: fine
  effect: flag
  severity: LOW
  condition: "false"
"""
    assert faults(text) == [
        f"rules.yaml:8: colour: not a field of a policy; expected {FIELDS}",
        f"rules.yaml:5: {MISSING_SEVERITY}",
        "rules.yaml:5: name: found ''; expected 1 to 128 letters, digits, spaces and . _ -",
        "rules.yaml:6: effect: found 'warn'; expected flag or suppress_incident",
        "rules.yaml:7: condition: line 1, column 1: undeclared reference to 'nope' (in container '')",
        f"rules.yaml:9: expected a policy with {FIELDS}",
        "rules.yaml:10: name: 'fine' is already in line 1; expected unique names",
    ]


def test_a_name_may_be_used_once_per_tenant_and_once_for_all_tenants():
    text = one() + one(tenant_id="acme") + one(tenant_id="globex")
    assert [draft.tenant_id for draft in read(text)] == [None, "acme", "globex"]
    assert faults(text + one(tenant_id="acme")) == [
        "rules.yaml:15: name: 'slow' is already in line 5; expected unique names"
    ]


def test_two_policies_with_one_name_on_one_line_are_refused():
    policy = '{"name": "a", "effect": "flag", "severity": "LOW", "condition": "true"}'
    assert faults(f"[{policy}, {policy}]") == ["rules.yaml:1: name: 'a' is already in line 1; expected unique names"]


def test_a_duplicate_field_is_refused():
    words = faults(one() + '  condition: "false"\n')
    assert len(words) == 1
    assert words[0].startswith("rules.yaml:5: condition: ")


@pytest.mark.parametrize(
    ("condition", "line", "place"),
    [
        ("nope == 1", 4, "line 1, column 1"),
        ("true && nope", 4, "line 1, column 9"),
        ("'true && nope'", 4, "line 1, column 9"),
        ("\n    nope == 1", 5, "line 1, column 1"),
        ("|\n    true &&\n    nope == 1", 6, "line 2, column 1"),
        ("|\n    true &&\n\n      nope == 1", 7, "line 3, column 3"),
        ("|2-\n    true &&\n    nope == 1", 6, "line 2, column 1"),
        (">\n    true && nope", 5, "line 1, column 9"),
    ],
)
def test_an_invalid_condition_is_reported_with_its_line_in_the_file_and_its_column(
    condition: str, line: int, place: str
):
    words = f"rules.yaml:{line}: condition: {place}: undeclared reference to 'nope' (in container '')"
    assert faults(one(condition=condition)) == [words]


def test_an_invalid_condition_in_a_json_file_is_reported_with_its_line():
    policy = {"name": "a", "effect": "flag", "severity": "LOW", "condition": "nope == 1"}
    assert faults(json.dumps([policy], indent=2)) == [
        "rules.yaml:6: condition: line 1, column 1: undeclared reference to 'nope' (in container '')"
    ]


@pytest.mark.parametrize("text", ["", " \n", "# nothing\n", "---\n", "null", "5", "{}", "policies:", "policies: {}"])
def test_a_file_without_a_list_is_refused(text: str):
    assert faults(text) == [f"rules.yaml:1: {NO_LIST}"]


@pytest.mark.parametrize(
    "text",
    [
        "- &a {name: *a}",
        "- name: &x a\n  tenant_id: *x",
        "a: &a [1, 1]\nb: &b [*a, *a]\npolicies: [*b, *b]",
        "- &base {severity: LOW}\n- {<<: *base}",
    ],
)
def test_aliases_are_refused(text: str):
    words = faults(text)
    assert len(words) == 1
    assert words[0].endswith(": aliases are not allowed; repeat the value")


@pytest.mark.parametrize(
    ("text", "line"),
    [("- name: a\n  effect: b: c\n", 2), ("- name: [\n", 2), ('- name: "a\n', 2), ("- a\n\tb: 1\n", 2)],
)
def test_invalid_yaml_is_refused_with_its_line(text: str, line: int):
    assert faults(text)[0].startswith(f"rules.yaml:{line}: ")


HOSTILE = {
    "deep flow": "[" * 3000,
    "deep closed flow": "[" * 500 + "]" * 500,
    "deep mappings": "{a: " * 3000,
    "deep in a field": one(name="[" * 400 + "]" * 400),
    "deep blocks": "- " * 3000 + "a",
    "a list as key": "- {? [a] : b}",
    "a mapping as key": "- {? {a: b} : b}",
    "a mapping as a key of the file": "? {a: b}\n: c\n? [policies]\n: []\n",
    "an invalid date": "- {name: 2026-13-45}",
    "an invalid time": "- {name: 2001-12-14t99:59:43.10Z}",
    "an invalid offset": "- {name: 2001-12-14t21:59:43.10-99:00}",
    "a date as key": "- {2026-13-45: a}",
    "an invalid int": "- {name: !!int foo}",
    "an empty hexadecimal": "- {name: 0x_}",
    "an invalid float": "- {name: !!float foo}",
    "an invalid bool": "- {name: !!bool foo}",
    "an invalid timestamp": "- {name: !!timestamp foo}",
    "an invalid binary": '- {name: !!binary "ä"}',
    "binary": '- {name: !!binary "YQ=="}',
    "a set": "- {name: !!set {a, b}}",
    "an ordered map": "- {name: !!omap [a: 1]}",
    "pairs": "- {name: !!pairs [a: 1, a: 2]}",
    "python object": '- !!python/object/apply:os.system ["exit 1"]',
    "python object as a field": '- {name: !!python/object/apply:os.system ["exit 1"]}',
    "python name": "- {name: !!python/name:os.system }",
    "local tag": "- {name: !local x}",
    "a merge of a wrong name": "- {<<: {name: 5}}",
    "a merge of a number": "- {<<: 5}",
    "an integer of 5000 digits": "- {name: " + "1" * 5000 + "}",
    "a hexadecimal of 5000 digits": "- {name: 0x" + "f" * 5000 + "}",
    "nan": "- {severity: .nan, enabled: .inf}",
    "value": "- {name: =, =: 1}",
    "null keys": "- {null: 1, 1.5: 2, true: 3}",
    "two documents": "--- []\n--- []\n",
    "another version of yaml": "%YAML 9.9\n---\n[]",
    "NUL": "\x00",
    "half of a surrogate pair": "\ud800",
    "half of a surrogate pair, escaped": '- {name: "\\ud800", condition: "\\ud800"}',
    "control characters": "- {name: \x1b[31m}",
    "a tag on a sequence": "- !!str {}",
    "a tag on a scalar": "- !!map x",
    "a set for a policy": "- !!set {name: a}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_refused_with_a_bounded_error(text: str):
    with pytest.raises(PolicyFileError) as caught:
        read(text)
    words = str(caught.value)
    assert words.startswith("rules.yaml:")
    assert len(words) < 2_000


def test_a_byte_order_mark_is_accepted():
    assert read("\ufeff" + one()) == read(one())


def test_a_file_over_the_limit_is_refused_without_parsing():
    assert faults("[" * (FILE_MAX + 1)) == ["rules.yaml: larger than 4194304 bytes"]
    assert faults("\U0001f600" * (FILE_MAX // 4 + 1)) == ["rules.yaml: larger than 4194304 bytes"]


def test_a_thousand_policies_are_read():
    assert len(read("".join(one(name=f"rule {n}") for n in range(1000)))) == 1000


_SCRAPS = [
    "- ", "name: a", "effect: flag", "severity: LOW", 'condition: "true"', "condition: |", "\n", "\n  ", " ", ": ",
    "? ", "{", "}", "[", "]", ",", "&a ", "*a", "!!int ", "!!python/name:os ", "!", '"', "'", "|", ">", "#", "%", "@",
    "---", "...", "<<: ", "=", "~", "0x_", "2026-13-45", "1:99", "policies:", "\t", "\x00", "\ufeff", "\ud800", "\x85",
]  # fmt: skip


@settings(max_examples=600, deadline=None, database=None)
@given(st.lists(st.sampled_from(_SCRAPS), max_size=25).map("".join))
def test_any_invalid_text_raises_a_policy_file_error(text: str):
    try:
        drafts = read(text)
    except PolicyFileError as error:
        words = str(error)
    else:
        assert isinstance(drafts, list)
        return
    assert words.startswith("rules.yaml:")
