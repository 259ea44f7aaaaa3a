"""The README says what the code does."""

import ast
import json
import re
import uuid
from pathlib import Path

import yaml
from typer.testing import CliRunner

from config.settings import describe
from consumer.cli import app
from consumer.contract.run_message import decode
from consumer.metrics import Metrics
from domains.policies.files import read_policies
from tests.deploy.test_alerts import ALERTS

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
ON_CALL = README.partition("\n## For the person on call\n")[2].partition("\n## ")[0]


def test_the_settings_table_is_the_one_that_the_settings_describe():
    for name, default, meaning in describe():
        shown = default if default in {"required", "empty"} else f"`{default}`"
        assert f"| `{name}` | {shown} | {meaning} |" in README


def test_every_command_of_the_readme_exists_and_every_command_is_in_the_readme():
    told = CliRunner().invoke(app, ["--help"], env={"NO_COLOR": "1", "COLUMNS": "200"}).stdout
    commands = set(re.findall(r"^│ (\w+) ", told, re.MULTILINE)) - {"Show", "Install"}
    assert commands == {
        "worker",
        "migrate",
        "topology",
        "publish",
        "runs",
        "parked",
        "outbox",
        "policies",
        "reconcile",
        "prune",
        "doctor",
        "schema",
    }
    for command in commands:
        assert f"`closeout {command}" in README


def test_the_example_messages_are_valid():
    examples = [ast.parse(file.read_text()) for file in (ROOT / "deploy" / "examples").glob("publish*.py")]
    assert len(examples) == 2
    for tree in examples:
        (run,) = (
            node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUN"
        )
        body = eval(f"json.dumps({ast.unparse(run)})", {"json": json, "uuid": uuid})  # noqa: S307 - our own example
        assert decode(body.encode(), max_bytes=10_000).run.tenant_id == "acme"


def test_the_example_policy_is_valid():
    example = re.search(r"## Policies\n\n```yaml\n(.*?)```", README, re.DOTALL)
    assert example
    (draft,) = read_policies(example[1], source="README.md")
    assert draft.tenant_id == yaml.safe_load(example[1])[0]["tenant_id"]


def test_every_file_that_the_readme_names_exists():
    root = Path(__file__).parents[3]
    for name in re.findall(r"`((?:consumer|domains|scripts|deploy|config)/[\w./]*|\w+\.py)`", README):
        assert (root / name).exists() or (root / "consumer" / name).exists(), name


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    # As code hosts make them.
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([\w-]+)\)", README)
    assert len(links) > 20
    assert set(links) - anchors == set()


def test_every_picture_that_the_readme_shows_exists_and_is_small():
    pictures = re.findall(r"\]\(([\w./-]+\.png)\)", README)
    assert pictures
    for name in pictures:
        assert (Path(__file__).parents[3] / name).stat().st_size < 150_000, name


def test_every_fault_test_has_its_row_and_every_row_its_test():
    tests = Path(__file__).parents[2]

    def found(folder: Path) -> set[str]:
        return {n for f in folder.rglob("test_*.py") for n in re.findall(r"def test_(\w+)\(", f.read_text())}

    named = set(re.findall(r"`([a-z]\w{15,})`", README.partition("## Crash here")[2].partition("## Phases")[0]))
    assert found(tests / "faults") - named == set()
    assert named - found(tests) - {"attempts_exhausted", "consumer_timeout"} == set()


def test_the_metrics_table_is_the_one_that_the_metrics_describe():
    for metric in Metrics().described:
        labels = f"{{{', '.join(metric.labels)}}}" if metric.labels else ""
        assert f"| `{metric.name}{labels}` | {metric.meaning} | {metric.rise} | {metric.to_do} |" in README
    assert README.count("\n| `closeout_") == len(Metrics().described)


def test_every_alert_leads_to_its_paragraph_and_every_paragraph_has_its_alert():
    headings = re.findall(r"^### (\w+)$", ON_CALL, re.MULTILINE)
    assert headings == list(ALERTS)
    for alert, rule in ALERTS.items():
        # A heading's anchor, as code hosts make it.
        assert rule["annotations"]["runbook"] == f"README.md#{alert.lower()}"


def test_every_paragraph_for_the_person_on_call_says_how_urgent_it_is_what_to_look_at_and_when_it_is_harmless():
    for alert, rule in ALERTS.items():
        paragraph = ON_CALL.partition(f"### {alert}\n")[2].partition("\n### ")[0]
        assert paragraph.lstrip().startswith(rule["labels"]["severity"].capitalize() + ".")
        assert "armless" in paragraph
        assert "`" in paragraph
    for anchor in re.findall(r"\]\(#(\w+)\)", ON_CALL):
        assert anchor in {alert.lower() for alert in ALERTS}


def test_every_command_for_the_person_on_call_exists_with_its_options():
    commands = re.findall(r"`closeout ([^`]+)`", ON_CALL)
    assert len(commands) > 10
    for command in commands:
        words = command.split()
        path = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        told = CliRunner().invoke(app, [*path, "--help"], env={"NO_COLOR": "1", "COLUMNS": "200"})
        assert told.exit_code == 0, command
        for option in (word for word in words if word.startswith("--")):
            assert option in told.stdout, command
