"""The complete command line: every command of the contract exists and has a useful --help."""

import inspect
import json
import logging
import shlex
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import typer.main
from typer.testing import CliRunner

from consumer.cli import app
from tests.support import run_messages as runs

# The commands of the contract.
CONTRACT = """
worker | migrate | distribute | topology | publish | runs list | runs show | parked list | parked show | parked replay |
parked discard | outbox status | outbox drain | policies list | policies apply |
policies test | policies backtest | policies shadow | reconcile | prune | doctor | schema
"""


def commands(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    if children := getattr(command, "commands", None):
        for name, child in children.items():
            yield from commands(child, *names, name)
    else:
        yield " ".join(names), command


ALL = dict(commands(typer.main.get_command(app)))
MACHINES_READ = set(ALL) - {"worker", "schema"}


def test_every_command_of_the_contract_exists_and_no_other():
    named = {name.strip() for name in CONTRACT.split("|")}

    assert named <= ALL.keys()
    assert {name.split()[0] for name in ALL} == {name.split()[0] for name in named}


def test_schema_prints_the_three_documents_of_the_contract():
    for document in ("run-completed", "events", "asyncapi"):
        assert json.loads(CliRunner().invoke(app, ["schema", document]).stdout)


@pytest.mark.parametrize("name", ALL)
def test_every_command_help_has_an_example_and_fits_80_columns(name):
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"NO_COLOR": "1", "COLUMNS": "80"})

    assert result.exit_code == 0
    example = result.stdout.partition("Example: ")[2]
    assert f"closeout {name}" in " ".join(example.split()), result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert result.stdout.count("<bool>") <= 1  # of --help, which is typer's own
    assert "--no-" not in result.stdout
    # Where a terminal would wrap a line again, the next one would hold a single word.
    assert all(len(line) <= 78 for line in inspect.cleandoc(ALL[name].help).partition("\n\n")[2].splitlines())


@pytest.mark.parametrize("name", ALL)
def test_every_example_parses(name):
    for example in (ALL[name].help or "").split("Example: ")[1:]:
        written = " ".join(example.split())
        arguments = shlex.split(written.partition(f"closeout {name}")[2].split(">")[0])
        ALL[name].make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize("name", sorted(MACHINES_READ))
def test_every_reporting_command_has_a_json_option(name):
    assert "--json" in {option for parameter in ALL[name].params for option in parameter.opts}


def test_a_usage_error_exits_with_2():
    wrong = (["nonsense"], ["runs", "show"], ["publish"], ["parked", "list", "--limit", "none"])
    for arguments in (*wrong, ["runs", "list", "--status", "fail"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def test_a_run_id_of_another_tenant_than_the_option_is_a_usage_error():
    result = CliRunner().invoke(app, ["runs", "show", "--tenant", "acme", f"globex/{uuid4()}"])

    assert result.exit_code == 2
    assert result.stderr == "--tenant: found 'acme', but RUN names tenant 'globex'; expected the same\n"


def test_publish_reports_an_early_end_in_json_and_names_an_unreadable_file(tmp_path):
    unavailable = {"AMQP_URL": "amqp://u:p@127.0.0.1:1/"}
    good = tmp_path / "runs.jsonl"
    good.write_bytes(runs.body())

    # A file that can be opened and not read, even by root.
    for file, why in (("/proc/self/mem", "FILE: read failed: "), (str(good), "RabbitMQ is not available: ")):
        result = CliRunner().invoke(app, ["publish", file, "--json"], env=unavailable)
        assert result.exit_code == 1
        document = json.loads(result.stdout)
        assert (document["published"], document["refused"]) == (0, 0)
        assert document["failure"].startswith(why)
        assert result.stderr.startswith(f"0 published and confirmed, then: {why}")


def test_the_shells_completion_can_be_installed_and_names_every_command():
    runner = CliRunner()
    assert "--install-completion" in runner.invoke(app, ["--help"], env={"COLUMNS": "100"}).stdout

    result = runner.invoke(
        app, [], prog_name="closeout",
        env={"_CLOSEOUT_COMPLETE": "complete_bash", "COMP_WORDS": "closeout outbox ", "COMP_CWORD": "2"},
    )  # fmt: skip
    assert result.stdout.split() == ["status", "drain"]


def test_logs_go_to_the_current_standard_error_after_a_command_replaced_it(capsys):
    """Click's runner closes its own stream, which the handler must not keep."""
    unavailable = {"DATABASE_URL": "postgresql://u:p@127.0.0.1:1/x"}
    assert CliRunner().invoke(app, ["runs", "list"], env=unavailable).exit_code == 1

    logging.getLogger("a library").error("the event")

    written = capsys.readouterr().err
    assert "the event" in written
    assert "Logging error" not in written
