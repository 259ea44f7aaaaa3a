"""Every example of the README, run from top to bottom on real servers with a real worker.

``WRITE_README=1`` writes what the commands say now into the console blocks (those without an omission).
"""

import os
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer

from tests.acceptance import roles_of_commands as parts
from tests.acceptance.readme_blocks import README, Block, as_shown, blocks, has_shape
from tests.acceptance.readme_reader import LISTED, PARKED, ROOT, Reader
from tests.support import roles
from tests.unit.commands.test_command_line import ALL

TEXT = README.read_text()
BLOCKS = blocks(TEXT)
# Blocks that are not run, by their first line, and why.
NOT_RUN = {
    "scripts/demo ": "the demonstration and the suite itself, with servers of their own; CI is the second",
    "docker build": "needs an engine and a cluster; tests/deploy/test_deployment_walk.py reads it",
    "      - TRANSACTION_COORDINATOR_ENABLED": "lines of a kustomization; tests/deploy has them in an overlay",
    "psql -v ON_ERROR_STOP": "an administrator's, once; tests/support/roles.py does it",
    "DATABASE_URL='postgresql://worker": "names hosts; test_tls.py uses such URLs",
    'psql "$WORKERS_URL': "an administrator's, once; test_pgbouncer.py does it",
    "pip install --require-hashes -r deploy/requirements.txt": (
        "installs into the machine; test_installed_wheel.py does it in a folder"
    ),
    "pip install --require-hashes -r deploy/requirements-otel.txt": (
        "the same, and wants a collector; test_tracing_exported.py has a worker and one"
    ),
}
# Blocks in these languages are no examples to run.
PICTURES = {"", "mermaid"}


@pytest.fixture(scope="module")
def reader(folder: Path, postgres: PostgresServer, rabbit: RabbitServer) -> Iterator[Reader]:
    made = Reader(folder / "readme", postgres, rabbit, "readme")
    yield made
    made.close()
    postgres.drop_database("readme")
    rabbit.delete_vhost("readme")


def test_every_example_does_what_the_readme_says(reader):
    reading = Reading(reader)
    for block in BLOCKS:
        if block.language not in PICTURES and not any(map(block.text.startswith, NOT_RUN)):
            reading.follow(block)
    if os.environ.get("WRITE_README"):
        README.write_text(reading.text)
    else:
        assert not reading.differences, "\n".join(reading.differences)
    assert not reading.before, "a step belongs to a command that the README does not have"
    assert not reading.after, "a step belongs to a command that the README does not have"
    assert set(ALL) - reading.commands == set(), "commands that no example shows"


def test_what_is_not_run_is_there_and_nothing_else_is_left_out():
    for start in NOT_RUN:
        assert sum(block.text.startswith(start) for block in BLOCKS) == 1
    assert {block.language for block in BLOCKS} - PICTURES == {"python", "sh", "console", "sql", "yaml"}


def test_the_roles_and_users_as_whom_it_is_all_run_are_those_that_are_shipped():
    shipped = {user["name"] for user in roles.DEFINITIONS["users"]}
    assert {part.user for part, _ in parts.ROWS} - {None} == shipped
    assert {part.role for part, _ in parts.ROWS} - {None} == {roles.OWNER, roles.WORKER, roles.OPERATOR, roles.READER}
    assert {command[0] for command in parts.NAMED} <= {name.split()[0] for name in ALL}


def test_what_is_shown_of_a_file_is_the_file():
    shown = [block.text for block in BLOCKS if block.language == "python"]
    for file in (ROOT / "deploy" / "examples").glob("*.py"):
        assert file.read_text() in shown, file
        assert f"`deploy/examples/{file.name}`" in TEXT


def test_a_shape_differs_by_words_and_numbers_and_not_by_ids_and_times():
    one = "run 0a0c9a3e-4a1f-5b0e-9a53-0f0f6c0a9a11 at 2026-11-24 18:05:51.123\n  waits for 12 s, 3 events"
    other = "run 5b2f6f0e-6d0c-4a51-9c55-0a4f8a1b7d11 at 2026-01-01 00:00:00 waits for 99 min, 3 events"
    assert has_shape(one, other)
    assert not has_shape(one, other.replace("3 events", "2 events"))
    assert not has_shape(one, other.replace("waits", "is"))
    assert has_shape(f"first\n{one}\nlast", "first\n...\nlast")
    assert not has_shape(f"first\n{one}", "first\n...\nlast")


class Reading:
    """What the reader has come to."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.text = TEXT
        self.commands: set[str] = set()
        self.differences: list[str] = []
        replay = f"closeout parked replay --run globex/{PARKED}"
        # What happens just before a command, and just after one.
        self.before = {
            "closeout doctor": reader.runs_get_stuck,
            "closeout runs list --tenant globex --limit 3": reader.work_goes_on,
            replay: reader.the_cause_is_mended,
            "closeout prune --older-than 90d --dry-run": reader.a_run_grows_old,
        }
        self.after = {
            "closeout migrate": reader.rights_are_granted,
            replay: lambda: reader.until_closed_out(PARKED),
        }

    def follow(self, block: Block) -> None:
        """Do what *block* says."""
        getattr(self, f"_follow_{block.language}")(block)

    def _follow_sh(self, block: Block) -> None:
        for line in block.text.splitlines():
            said = self._type(line)
            if said is not None:
                assert said[0] == 0, f"README.md:{block.line}: {line}\n{said[1]}"

    def _follow_console(self, block: Block) -> None:
        for command, shown in block.prompts():
            said = self._type(command)
            assert said is not None
            assert said[0] in {0, 1}, f"README.md:{block.line}: {command}\n{said[1]}"
            if not has_shape(said[1], shown):
                self.differences.append(f"README.md:{block.line}: {command} says now:\n{said[1]}")
            if "\n...\n" not in f"\n{shown}":
                self.text = self.text.replace(f"$ {command}\n{shown}", f"$ {command}\n{said[1]}", 1)

    def _follow_python(self, block: Block) -> None:
        if "sqlite3" in block.text:
            self._subscribe(block)
            return
        coordinator = "coordinator" in block.text
        part = parts.WORKER._replace(user=None) if coordinator else parts.RUNNER
        said = self._reader.run_as(part, sys.executable, "-W", "error", "-c", block.text)
        assert said.status == 0, said.text
        shown = "committed COMMITTED" if coordinator else f"confirmed: acme/{PARKED}"
        assert has_shape(said.text, shown), said.text

    def _follow_yaml(self, block: Block) -> None:
        (self._reader.folder / "policies.yaml").write_text(block.text)

    def _follow_sql(self, block: Block) -> None:
        if "pg_stat_activity" in block.text:
            self._reader.sql(block.text)  # an administrator's, as the README says
        else:
            self._reader.sql(block.text, role=roles.READER)

    def _type(self, line: str) -> tuple[int, str] | None:
        """Type one line; return how it ended and what it said, or ``None`` if it goes on."""
        words = shlex.split(line, comments=True)
        command = shlex.join(words)
        if words[0] == "closeout":
            self.commands |= {name for name in ALL if command.startswith(f"closeout {name}")}
        self.before.pop(command, lambda: None)()
        if words == ["closeout", "worker"]:
            self._reader.start(*words, part=parts.WORKER)
            return None
        said = self._reader.run(*words)
        self.after.pop(command, lambda: None)()
        return said.status, as_shown(said.text)

    def _subscribe(self, block: Block) -> None:
        """The subscriber hears what it has bound, once, though it comes again, and though it is killed."""
        reader = self._reader
        program = reader.folder / "subscriber.py"
        program.write_text(block.text)
        reader.until_told(5)  # by the runner's guide, to nobody yet
        subscriber = reader.start(sys.executable, str(program), part=parts.SUBSCRIBER)
        reader.until(lambda: reader.consumers("subscriber.on-call") == 1)
        events = reader.events_come_again()
        reader.until(lambda: reader.log("subscriber").count("seen") == 2)
        subscriber.kill()
        subscriber.wait(10)
        with sqlite3.connect(reader.folder / "subscriber.db") as store:
            kept = [store.execute(f"SELECT * FROM {table}").fetchall() for table in ("urgent", "ended")]
        store.close()
        run = f"globex/{LISTED.format(8)}"
        assert kept == [[(run, "CRITICAL", "AGENT_CRASH")], [(run, "failed")]]
        assert [event["type"] for event in events] == ["incident.created", "policy.evaluated", "run.finalized"]
        assert reader.log("subscriber").count("new ") == 2
