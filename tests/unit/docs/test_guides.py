"""The guides agree with the code on fault tests, policies and phases."""

import re
from pathlib import Path

import yaml

from consumer.phases import diagram
from domains.policies.files import read_policies
from tests.support.guides import ROOT, read, section

TESTS = ROOT / "tests"


def test_every_fault_test_has_a_row_and_every_row_names_a_test():
    def found(folder: Path) -> set[str]:
        return {n for f in folder.rglob("test_*.py") for n in re.findall(r"def test_(\w+)\(", f.read_text())}

    rows = [line for line in section("tests/README.md", "## Fault tests").splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([a-z]\w+)`", row.rpartition(" | ")[2])}
    assert found(TESTS / "faults") - named == set()
    assert named - found(TESTS) == set()


def test_the_example_policy_is_valid():
    example = re.search(r"```yaml\n(.*?)```", read("domains/policies/README.md"), re.DOTALL)
    assert example
    (draft,) = read_policies(example[1], source="README.md")
    assert draft.tenant_id == yaml.safe_load(example[1])[0]["tenant_id"]


def test_the_phase_diagram_is_printed_from_the_table_of_moves():
    assert f"```mermaid\n{diagram()}\n```" in read("consumer/README.md")
