"""The installed ``closeout`` command as a process, between another RabbitMQ client and a real database.

Runs on both major versions of RabbitMQ.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pika
import pytest
from servers import PostgresServer, RabbitServer
from servers.ports import Port

from tests.acceptance import roles_of_commands as identities
from tests.acceptance.roles_of_commands import Identity, identity_for
from tests.support import roles
from tests.support import run_messages as runs
from tests.support.citus_server import grant_after_migration, passed_checks
from tests.support.command_line import CLOSEOUT, run
from tests.support.http import request_blocking
from tests.support.waiting import PATIENCE, until_blocking


class Installation:
    """One database, one vhost, and the command line over both, each command with its own role and user.

    They have only the privileges of ``deploy/``, so that every test here also shows that these are enough.
    """

    def __init__(self, postgres: PostgresServer, database: str, rabbit: RabbitServer, vhost: str) -> None:
        self.postgres, self.database = postgres, database
        self.database_url = postgres.create_database(database)
        self.amqp_url = rabbit.create_vhost(vhost)
        for user in roles.DEFINITIONS["users"]:
            roles.permit(rabbit, vhost, user["name"])
        self._ports = [Port()]
        self.port = self._ports[0].number
        self.environ = {
            **{name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "AMQP_URL"}},
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(self.port),
            "TRANSACTION_COORDINATOR_ENABLED": "true",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }

    def run(self, *arguments: str, status: int = 0, stdin: str = "") -> str:
        done = run(*arguments, env=self.environ | self.urls(identity_for(arguments)), stdin=stdin)
        assert done.returncode == status, done.stdout + done.stderr
        return str(done.stdout + done.stderr)

    def urls(self, identity: Identity) -> dict[str, str]:
        return identity.environ(database_url=self.database_url, amqp_url=self.amqp_url)

    def worker(self) -> "subprocess.Popen[bytes]":
        environ = self.environ | self.urls(identities.WORKER)
        return subprocess.Popen([CLOSEOUT, "worker"], env=environ, stderr=subprocess.PIPE)

    @contextmanager
    def channel(self, identity: Identity) -> Iterator[Any]:
        """A channel of *identity*'s user, from pika."""
        connection = pika.BlockingConnection(pika.URLParameters(self.urls(identity)["AMQP_URL"]))
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
        connection.close()

    def another_port(self) -> int:
        """Reserve and return a port for a second worker."""
        self._ports.append(Port())
        return self._ports[-1].number

    def sql(self, statement: str) -> str:
        return str(self.postgres.psql(statement, self.database)).strip()

    def http(self, path: str, port: int = 0) -> str:
        return request_blocking(port or self.port, path).body

    def ready(self, port: int = 0) -> bool:
        return bool(json.loads(self.http("/readyz", port))["ready"])


@pytest.fixture
def installation(postgres: PostgresServer, any_rabbit: RabbitServer) -> Iterator[Installation]:
    name = f"acceptance{time.monotonic_ns()}"
    made = Installation(postgres, name, any_rabbit, name)
    roles.make_roles(postgres, name)
    made.run("migrate")
    grant_after_migration(postgres, name)
    made.run("topology")
    yield made
    postgres.drop_database(name)
    any_rabbit.delete_vhost(name)


@pytest.fixture
def runner(installation: Installation) -> Iterator[Any]:
    with installation.channel(identities.RUNNER) as channel:
        yield channel


@pytest.fixture
def subscriber(installation: Installation) -> Iterator[Any]:
    with installation.channel(identities.SUBSCRIBER) as channel:
        yield channel


@pytest.fixture
def operator(installation: Installation) -> Iterator[Any]:
    with installation.channel(identities.OTHERS) as channel:
        yield channel


def test_a_worker_closes_out_runs_drops_duplicates_parks_invalid_ones_and_exits_0(
    installation, runner, subscriber, operator
):
    queue = subscriber.queue_declare("subscriber.everything", exclusive=True).method.queue
    subscriber.queue_bind(queue, "governance.events", "#")
    good = [runs.body() for _ in range(50)]
    bad = {"invalid_json": b"\xff\x00 not json", "schema_violation": runs.body(tenant_id=...)}
    process = installation.worker()
    try:
        for body in [*good, *bad.values(), *good]:
            runner.basic_publish(
                "runs", "run.completed", body, pika.BasicProperties(content_type="application/json"), mandatory=True
            )
        until_blocking(
            lambda: (
                installation.sql("SELECT count(*) FROM governance.run_completions WHERE phase = 'EVENTS_PUBLISHED'")
                == "50"
            )
        )
        until_blocking(installation.ready)
        until_blocking(lambda: 'closeout_deliveries_total{result="duplicate"} 50.0' in installation.http("/metrics"))
        events = _take(subscriber, queue, 150)
        parked = _take(operator, "closeout.parked", 2)
    finally:
        process.send_signal(signal.SIGTERM)
        logs = process.communicate(timeout=PATIENCE)[1].decode()

    assert process.returncode == 0, logs
    assert {properties.headers["x-closeout-reason"]: body for properties, body in parked} == bad
    assert len({properties.message_id for properties, _ in events}) == 150
    run_id = ""
    for body in good:
        run_id = str(runs.run_id_of(body))
        mine = [json.loads(sent) for properties, sent in events if properties.correlation_id == run_id]
        assert [event["type"] for event in mine] == ["incident.created", "policy.evaluated", "run.finalized"]
        assert {event["subject"] for event in mine} == {f"acme/{run_id}"}
    for table in ("incidents", "policy_evaluations", "traces"):
        assert installation.sql(f"SELECT count(*) FROM governance.{table}") == "50"
    assert installation.sql("SELECT count(*) FROM governance.outbox_events") == "0"
    records = [json.loads(line) for line in logs.splitlines()]
    assert records[-1]["event"] == "stopped"
    assert len(records) < 30, "a quiet default: lines per batch or per second, not per message"
    shown = installation.run("runs", "show", f"acme/{run_id}")
    assert "EVENTS_PUBLISHED" in shown
    assert "EXECUTION_TIMEOUT" in shown


def test_doctor_accepts_a_workers_role_and_user_next_to_a_live_worker(installation):
    process = installation.worker()
    try:
        until_blocking(installation.ready)
        assert f"0 problems, 0 warnings, {passed_checks(installation.postgres, 22)}" in installation.run("doctor")
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def test_two_workers_given_the_same_runs_commit_each_once(installation, runner):
    bodies = [runs.body() for _ in range(100)]
    first = installation.worker()
    installation.environ["HTTP_PORT"] = str(installation.another_port())
    second = installation.worker()
    try:
        for port in (installation.port, int(installation.environ["HTTP_PORT"])):
            until_blocking(partial(installation.ready, port))
        for body in bodies * 2:
            runner.basic_publish("runs", "run.completed", body, pika.BasicProperties(content_type="application/json"))
        until_blocking(
            lambda: (
                installation.sql("SELECT count(*) FROM governance.run_completions WHERE phase = 'EVENTS_PUBLISHED'")
                == "100"
            )
        )
    finally:
        for process in (first, second):
            process.send_signal(signal.SIGINT)
        logs = [process.communicate(timeout=PATIENCE)[1].decode() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], logs
    assert installation.sql("SELECT count(*) FROM governance.incidents") == "100"
    assert installation.sql("SELECT count(*) FROM governance.rollbacks") == "0"


def test_the_command_line_publishes_lists_and_applies_policies(installation, tmp_path):
    lines = [runs.body(), b"{broken", runs.body(tenant_id="not allowed"), runs.body()]
    file = tmp_path / "runs.jsonl"
    file.write_bytes(b"\n".join(lines))
    output = installation.run("publish", str(file), status=1)
    assert "line 2: invalid_json" in output
    assert "line 3: schema_violation: tenant_id" in output
    assert "2 published and confirmed, 2 refused" in output
    assert json.loads(installation.run("publish", "-", "--json", stdin=lines[0].decode())) == {
        "published": 1,
        "refused": 0,
        "failure": None,
    }
    policies = tmp_path / "policies.yaml"
    policies.write_text(
        "policies:\n- name: expensive\n  effect: flag\n  severity: HIGH\n  condition: run.usage.cost_usd > 0.01\n"
    )
    assert "expensive: created, version 1" in installation.run("policies", "apply", str(policies))
    assert "expensive: unchanged" in installation.run("policies", "apply", str(policies))
    policies.write_text(policies.read_text().replace("> 0.01", "> > 0.01"))
    assert "policies.yaml:5: condition: line 1, column 22" in installation.run(
        "policies", "apply", str(policies), status=1
    )
    assert "run.usage.cost_usd > 0.01" in installation.run("policies", "list")
    process = installation.worker()
    try:
        until_blocking(
            lambda: (
                installation.sql("SELECT count(*) FROM governance.run_completions WHERE phase = 'EVENTS_PUBLISHED'")
                == "2"
            )
        )
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    listed = json.loads(installation.run("runs", "list", "--json"))
    assert {run["policy"] for run in listed} == {"violation"}
    assert installation.run("migrate", "--check").strip() == "schema and tables agree"


def test_a_worker_without_the_coordinator_warns_and_uses_the_legacy_path(installation, runner):
    del installation.environ["TRANSACTION_COORDINATOR_ENABLED"]
    process = installation.worker()
    try:
        runner.basic_publish(
            "runs", "run.completed", runs.body(), pika.BasicProperties(content_type="application/json")
        )
        until_blocking(
            lambda: installation.sql("SELECT mode || phase FROM governance.run_completions") == "legacyEVENTS_PUBLISHED"
        )
        assert "closeout_coordinator_enabled 0.0" in installation.http("/metrics")
    finally:
        process.terminate()
        logs = process.communicate(timeout=PATIENCE)[1].decode()
    warnings = [json.loads(line) for line in logs.splitlines() if json.loads(line)["level"] == "warning"]
    assert "TRANSACTION_COORDINATOR_ENABLED IS FALSE" in warnings[0]["event"]


def _take(channel: Any, queue: str, number: int) -> list[tuple[Any, bytes]]:
    found: list[tuple[Any, bytes]] = []

    def more() -> bool:
        _, properties, body = channel.basic_get(queue, auto_ack=True)
        if body is not None:
            found.append((properties, body))
        return len(found) == number

    until_blocking(more, every=0.01, what=f"{number} messages in {queue}")
    return found
