"""The contract's guide lists everything that the code defines: fields, reasons, headers, events, queues, rules."""

import ast
import json
import re
import uuid
from typing import get_args

from consumer.contract import names
from consumer.contract.events import EventType
from consumer.contract.json_schema import run_completed_schema
from consumer.contract.refusals import ParkReason
from consumer.contract.run_message import decode
from domains.incidents.rules import severity_of
from domains.run import Step, Usage
from tests.support import run_messages as runs
from tests.support.guides import ROOT, section

GUIDE = "consumer/contract/README.md"


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the tables below *heading*, without header rows."""
    lines = [line for line in section(GUIDE, heading).splitlines() if line.startswith(("| `", "| any"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_every_field_of_the_message_is_listed_and_no_other():
    listed = rows("## The message")
    assert {name for row in listed for name in named(row[0])} == set(run_completed_schema()["properties"])
    required = {name for row in listed if row[1] == "yes" for name in named(row[0])}
    assert required == set(run_completed_schema()["required"])
    cells: dict[str, str] = {name: row[2] for row in listed for name in named(row[0])}
    assert set(Usage.__struct_fields__) <= named(cells["usage"])
    assert set(Step.__struct_fields__) <= named(cells["steps"])


def test_every_reason_for_parking_and_every_header_is_listed():
    listed = {name for row in rows("## Reasons for parking") for name in named(row[0])}
    headers = {value for name, value in vars(names).items() if name.endswith("_HEADER")}
    aside = {"x-closeout-user-id", "x-closeout-expiration", "x-closeout-cc", "x-closeout-bcc"}
    assert listed == set(get_args(ParkReason)) | headers | aside


def test_every_event_type_is_listed():
    assert {next(iter(named(row[0]))) for row in rows("## Events")} == set(get_args(EventType))


def test_every_queue_and_exchange_is_listed():
    known = {value for name, value in vars(names).items() if name.endswith(("_QUEUE", "_EXCHANGE"))}
    assert {name for row in rows("## Queues and exchanges") for name in named(row[0])} == known


def test_the_severities_are_those_of_the_rules():
    for codes, severity, category in rows("## Rules"):
        for code in named(codes) or {"ANY_OTHER"}:
            run = decode(runs.body(status="failed", error_code=code), max_bytes=10_000).run
            assert severity_of(run) == (severity, category)


def test_the_messages_of_the_example_programs_are_valid():
    programs = [ast.parse(file.read_text()) for file in (ROOT / "deploy" / "examples").glob("publish*.py")]
    assert len(programs) == 2
    for tree in programs:
        (run,) = (
            node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUN"
        )
        body = eval(f"json.dumps({ast.unparse(run)})", {"json": json, "uuid": uuid})  # noqa: S307 - our own example
        assert decode(body.encode(), max_bytes=10_000).run.tenant_id == "acme"
