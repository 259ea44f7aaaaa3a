"""Every example of the guides, run in order on real servers with a real worker.

``WRITE_GUIDES=1`` writes the current output into the console blocks that differ.
"""

import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer

from tests.acceptance import roles_of_commands as identities
from tests.acceptance.guide_blocks import Block, blocks, has_form, refreshed, trimmed
from tests.acceptance.guide_reader import LISTED, PARKED, ROOT, Reader
from tests.support import roles
from tests.support.citus_server import CitusForTests, passed_checks
from tests.support.guides import GUIDES, read
from tests.unit.commands.test_command_line import ALL

# The order in which a reader follows the examples: what one guide publishes, a later one lists.
ORDER = [
    "README.md",
    "consumer/contract/README.md",
    "domains/policies/README.md",
    "consumer/commands/README.md",
    "deploy/prometheus/README.md",
    "domains/migrations/README.md",
    "consumer/README.md",
    "deploy/kubernetes/README.md",
    "deploy/README.md",
    "consumer/tracing/README.md",
    "CONTRIBUTING.md",
]
BLOCKS = [block for guide in ORDER for block in blocks(guide, read(guide))]
# Blocks that are not run, by their first line, and the reason.
NOT_RUN = {
    "scripts/demo ": "a test below runs the demonstration; the second command is this suite",
    "scripts/install  ": "creates the environment that runs this, and runs this suite",
    "docker build": "needs a container engine and a cluster; tests/deploy/test_deployment_walk.py checks it",
    "kubectl ": "needs a cluster; tests/deploy builds the components",
    "      - TRANSACTION_COORDINATOR_ENABLED": "part of a kustomization; tests/deploy builds an overlay with it",
    "psql -v ON_ERROR_STOP": "run once by an administrator; tests/support/roles.py runs it",
    "DATABASE_URL='postgresql://worker": "names hosts; test_tls.py uses such URLs",
    'psql "$WORKERS_URL': "run once by an administrator; test_pgbouncer.py runs it",
    "pip install --require-hashes -r deploy/requirements.txt": (
        "installs on the machine; test_installed_wheel.py installs into a folder"
    ),
    "pip install --require-hashes -r deploy/requirements-otel.txt": (
        "as above, and needs a collector; test_tracing_exported.py has one"
    ),
}
# Blocks in these languages are not examples.
PICTURES = {"text", "mermaid"}


@pytest.fixture(scope="module")
def reader(folder: Path, postgres: PostgresServer, rabbit: RabbitServer) -> Iterator[Reader]:
    made = Reader(folder / "guides", postgres, rabbit, "guides")
    yield made
    made.close()
    postgres.drop_database("guides")
    rabbit.delete_vhost("guides")


def test_every_example_matches_its_guide(reader):
    run = ExampleRun(reader)
    for block in BLOCKS:
        if block.language not in PICTURES and not any(map(block.text.startswith, NOT_RUN)):
            run.follow(block)
    if os.environ.get("WRITE_GUIDES"):
        for guide, text in run.texts.items():
            (ROOT / guide).write_text(text)
    else:
        assert not run.differences, "\n".join(run.differences)
    assert not run.before, "a step belongs to a command that no guide has"
    assert not run.after, "a step belongs to a command that no guide has"
    assert set(ALL) - run.commands == set(), "commands that no example shows"


def test_every_guide_with_an_example_is_followed_and_only_the_listed_blocks_are_not_run():
    with_blocks = {guide for guide in GUIDES for block in blocks(guide, read(guide)) if block.language not in PICTURES}
    assert with_blocks - {"scripts/README.md"} == set(ORDER)
    for start in NOT_RUN:
        assert any(block.text.startswith(start) for block in BLOCKS), start
    assert {block.language for block in BLOCKS} - PICTURES == {"python", "sh", "console", "sql", "yaml"}


def test_the_example_commands_run_with_exactly_the_shipped_roles_and_users():
    shipped = {user["name"] for user in roles.DEFINITIONS["users"]}
    assert {row.user for row, _ in identities.ROWS} - {None} == shipped
    assert {row.role for row, _ in identities.ROWS} - {None} == {
        roles.OWNER, roles.WORKER, roles.OPERATOR, roles.READER,
    }  # fmt: skip
    assert {command[0] for command in identities.NAMED} <= {name.split()[0] for name in ALL}


def test_every_example_program_is_run_by_a_guide():
    commands = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]
    for file in (ROOT / "deploy" / "examples").glob("[!f]*.py"):  # tests/deploy runs from_*.py
        assert f"python deploy/examples/{file.name}" in commands


@pytest.mark.timeout(300)
def test_the_demonstration_prints_what_the_readme_shows():
    (shown,) = (block.text for block in blocks("README.md", read("README.md")) if "every run is complete" in block.text)
    done = subprocess.run(
        [ROOT / "scripts" / "demo", "--seed", "1"],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert has_form(done.stdout, f"...\n{shown}"), done.stdout


def test_a_form_distinguishes_words_and_numbers_but_not_ids_and_times():
    one = "run 0a0c9a3e-4a1f-5b0e-9a53-0f0f6c0a9a11 at 2026-11-24 18:05:51.123\n  waits for 12 s, 3 events"
    other = "run 5b2f6f0e-6d0c-4a51-9c55-0a4f8a1b7d11 at 2026-01-01 00:00:00 waits for 99 min, 3 events"
    assert has_form(one, other)
    assert not has_form(one, other.replace("3 events", "2 events"))
    assert not has_form(one, other.replace("waits", "is"))
    assert has_form(f"first\n{one}\nlast", "first\n...\nlast")
    assert not has_form(f"first\n{one}", "first\n...\nlast")


class ExampleRun:
    """The examples that were run so far, and what differed."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.texts = {guide: read(guide) for guide in ORDER}
        self.commands: set[str] = set()
        self.differences: list[str] = []
        replay = f"closeout parked replay --run globex/{PARKED}"
        # Actions just before and just after a command.
        self.before = {
            "closeout doctor": reader.make_runs_stuck,
            "closeout runs list --tenant globex --limit 3": reader.resume_work,
            replay: reader.fix_the_cause,
            "closeout prune --older-than 90d --dry-run": reader.age_a_run,
        }
        self.after = {
            "closeout migrate": reader.grant_rights,
            replay: lambda: reader.until_events_are_published(PARKED),
        }

    def follow(self, block: Block) -> None:
        """Run the commands or the program of *block*."""
        getattr(self, f"_follow_{block.language}")(block)

    def _follow_sh(self, block: Block) -> None:
        for line in block.text.splitlines():
            output = self._run(line)
            if output is not None:
                assert output[0] == 0, f"{block.place}: {line}\n{output[1]}"

    def _follow_console(self, block: Block) -> None:
        for command, shown in block.prompts():
            output = self._run(command)
            assert output is not None
            assert output[0] in {0, 1}, f"{block.place}: {command}\n{output[1]}"
            if self._matches(command, output[1], shown):
                continue
            self.differences.append(f"{block.place}: {command} now prints:\n{output[1]}")
            new = refreshed(shown, output[1]) if "\n...\n" in f"\n{shown}" else output[1]
            text = self.texts[block.guide]
            self.texts[block.guide] = text.replace(f"$ {command}\n{shown}", f"$ {command}\n{new}", 1)

    def _matches(self, command: str, output: str, shown: str) -> bool:
        """Compare an output with the guide's; a cluster has other tables, and more checks."""
        if isinstance(self._reader.postgres, CitusForTests):
            if command == "closeout distribute":
                return output.count("already distributed") > 1
            if command == "closeout doctor":
                shown = re.sub(r"(\d+) ok\n$", lambda last: passed_checks(self._reader.postgres, int(last[1])), shown)
            output = re.sub(r"_10\d{4}\b", "", output)  # the number of a shard, in names of tables and constraints
        return has_form(output, shown)

    def _follow_python(self, block: Block) -> None:
        identity = identities.WORKER._replace(user=None)
        output = self._reader.run_as(identity, sys.executable, "-W", "error", "-c", block.text)
        assert output.status == 0, output.text
        assert has_form(output.text, "committed COMMITTED"), output.text

    def _follow_yaml(self, block: Block) -> None:
        (self._reader.folder / "policies.yaml").write_text(block.text)

    def _follow_sql(self, block: Block) -> None:
        if "pg_stat_activity" in block.text:
            self._reader.sql(block.text)  # an administrator's, as the guide says
        else:
            self._reader.sql(block.text, role=roles.READER)

    def _run(self, line: str) -> tuple[int, str] | None:
        """Run one line; return its status and output, or ``None`` if it keeps running."""
        words = shlex.split(line, comments=True)
        command = shlex.join(words)
        if words[0] == "closeout":
            self.commands |= {name for name in ALL if command.startswith(f"closeout {name}")}
        self.before.pop(command, lambda: None)()
        if words == ["closeout", "worker"]:
            self._reader.start(*words, identity=identities.WORKER)
            return None
        if words[0] == "python":
            return self._program(words[1])
        output = self._reader.run(*words)
        self.after.pop(command, lambda: None)()
        return output.status, trimmed(output.text)

    def _program(self, name: str) -> tuple[int, str] | None:
        if "subscribe" in name:
            self._subscribe(name)
            return None
        output = self._reader.run_as(identities.RUNNER, sys.executable, "-W", "error", name)
        assert has_form(output.text, f"confirmed: acme/{PARKED}"), output.text
        return output

    def _subscribe(self, program: str) -> None:
        """Check that the subscriber takes each bound event once, although each is published twice."""
        reader = self._reader
        reader.until_published(5)  # by this guide, before the queue exists
        subscriber = reader.start(sys.executable, program, identity=identities.SUBSCRIBER)
        reader.until(lambda: reader.consumers("subscriber.on-call") == 1)
        events = reader.publish_events_twice()
        reader.until(lambda: reader.log("subscribe").count("seen") == 2)
        subscriber.kill()
        subscriber.wait(10)
        with sqlite3.connect(reader.folder / "subscriber.db") as store:
            kept = [store.execute(f"SELECT * FROM {table}").fetchall() for table in ("urgent", "ended")]
        store.close()
        run = f"globex/{LISTED.format(8)}"
        assert kept == [[(run, "CRITICAL", "AGENT_CRASH")], [(run, "failed")]]
        assert [event["type"] for event in events] == ["incident.created", "policy.evaluated", "run.finalized"]
        assert reader.log("subscribe").count("new ") == 2
