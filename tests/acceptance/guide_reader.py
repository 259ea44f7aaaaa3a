"""A reader who follows the guides: with a database, a vhost, a folder, a shell and a worker.

Each command and each program runs with its own role and broker user. This module also causes the states that the
examples show: a message that is parked, an exchange that is deleted, time that passes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import pika
from servers import PostgresServer, RabbitServer
from servers.ports import Port
from servers.postgres import SUPERUSER

from tests.acceptance import roles_of_commands as identities
from tests.acceptance.roles_of_commands import Identity, identity_for
from tests.acceptance.shell import Output, Shell
from tests.support import roles
from tests.support import run_messages as runs
from tests.support.citus_server import grant_after_migration

ROOT = Path(__file__).parents[2]
CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
PATIENCE = 30.0
NOT_INHERITED = {"COLUMNS", "LINES", "DATABASE_URL", "AMQP_URL"}
# The runs that the guides name.
PARKED = "5b2f6f0e-6d0c-4a51-9c55-0a4f8a1b7d11"
DONE = "3c9e1a52-8f1d-4c1b-8a86-3d2f0e9b6c22"
STRANDED = ("7a8d2b64-1f3e-4d9a-b0c7-5e6f1a2b3c33", "9d4c3b75-2a4f-4e8b-a1d8-6f7a2b3c4d44")
LISTED = "2f1a9c3e-5b7d-4e6f-8a9b-{:012d}"


def globex(run_id: str, **changes: Any) -> bytes:
    fields = {"tenant_id": "globex", "run_id": run_id, "trace_id": None, "completed_at": "2026-11-01T12:00:30+00:00"}
    return runs.body(**{**fields, **changes})


# A variable in front of a command.
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


class Reader:
    """Files that the commands of the guides name are in *folder*."""

    def __init__(self, folder: Path, postgres: PostgresServer, rabbit: RabbitServer, name: str) -> None:
        self.folder, self.postgres, self._database = folder, postgres, name
        self._urls = {"database_url": postgres.create_database(name), "amqp_url": rabbit.create_vhost(name)}
        roles.make_roles(postgres, name)
        for user in roles.DEFINITIONS["users"]:
            roles.permit(rabbit, name, user["name"])
        self.port = Port()
        self.environ = {
            **{name: value for name, value in os.environ.items() if name not in NOT_INHERITED},
            "PATH": f"{Path(CLOSEOUT).parent}:{os.environ['PATH']}",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(self.port.number),
            "TRANSACTION_COORDINATOR_ENABLED": "true",
            "DELIVERY_MAX_ATTEMPTS": "1",  # parked at once instead of after a minute
            "LOG_LEVEL": "WARNING",
        }
        for kind in ("examples", "prometheus"):
            shutil.copytree(ROOT / "deploy" / kind, folder / "deploy" / kind)
        three = [("6.25", "succeeded"), ("0.4", "succeeded"), ("7.5", "failed")]
        lines = [
            runs.body(run_id=LISTED.format(number), status=status, usage={"cost_usd": float(cost)},
                      error_code="STEP_FAILURE" if status == "failed" else None)
            for number, (cost, status) in enumerate(three)
        ]  # fmt: skip
        lines.append(runs.body(completed_at="yesterday"))
        (folder / "runs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        (folder / "run.json").write_bytes(runs.body(run_id=LISTED.format(9), usage={"cost_usd": 6.25}))
        self.shell = Shell(folder, self.environ)
        self._started: list[subprocess.Popen[bytes]] = []
        # Deletes exchanges and reads the length of queues.
        self._administrator = self._connect(self._urls["amqp_url"])
        self._channels = {
            identity: self._open(identity) for identity in (identities.RUNNER, identities.WORKER, identities.SUBSCRIBER)
        }

    def close(self) -> None:
        self.shell.close()
        for process in self._started:
            process.kill()
            process.wait(10)
        for channel in (self._administrator, *self._channels.values()):
            if channel.connection.is_open:
                channel.connection.close()

    def _open(self, identity: Identity) -> Any:
        """Return a channel of *identity*'s user, with publisher confirms."""
        return self._connect(self._urls_of(identity)["AMQP_URL"])

    def _connect(self, url: str) -> Any:
        channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
        channel.confirm_delivery()
        return channel

    def _urls_of(self, identity: Identity) -> dict[str, str]:
        return identity.environ(**self._urls)

    # Actions of the reader

    def start(self, *words: str, identity: Identity) -> "subprocess.Popen[bytes]":
        """Start a command that keeps running, as *identity*."""
        with (self.folder / f"{Path(words[-1]).stem}.log").open("ab") as log:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.environ | self._urls_of(identity), stdout=log, stderr=log
            )
        self._started.append(process)
        return process

    def started(self, number: int) -> "subprocess.Popen[bytes]":
        return self._started[number]

    def run(self, *words: str) -> Output:
        """Run a command to its end, ``closeout`` with its own identity; other programs get no URL."""
        assigned = dict(word.split("=", 1) for word in takewhile(_ASSIGNMENT.match, words))
        words = words[len(assigned) :]
        if words[0] == "closeout":
            return self.shell.closeout(*words[1:], urls=self._urls_of(identity_for(words[1:])) | assigned)
        return self.run_as(Identity(None, None), *words)

    def run_as(self, identity: Identity, *words: str) -> Output:
        """Run a program to its end, as *identity*."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environ | self._urls_of(identity), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
        )  # fmt: skip
        return Output(done.returncode, done.stdout)

    def sql(self, statement: str, *, role: str = SUPERUSER) -> str:
        return str(self.postgres.psql(statement, self._database, user=role)).strip()

    def publish(
        self, *bodies: bytes, identity: Identity = identities.RUNNER, exchange: str = "runs", key: str = "run.completed"
    ) -> None:
        for body in bodies:
            properties = pika.BasicProperties(content_type="application/json", delivery_mode=2)
            self._channels[identity].basic_publish(exchange, key, body, properties, mandatory=True)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"timed out; the worker's log:\n{self.log('worker')}"
            time.sleep(0.05)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def until_closed_out(self, *run_ids: str) -> None:
        named = ", ".join(f"'{run_id}'" for run_id in run_ids)
        query = f"SELECT count(committed_at) FROM governance.run_completions WHERE run_id IN ({named})"
        self.until(lambda: self.sql(query) == str(len(run_ids)))

    def until_events_are_published(self, run_id: str) -> None:
        query = f"SELECT phase FROM governance.run_completions WHERE run_id = '{run_id}'"
        self.until(lambda: self.sql(query) == "EVENTS_PUBLISHED")

    def until_published(self, runs_in_all: int) -> None:
        query = "SELECT count(*) FROM governance.run_completions WHERE phase = 'EVENTS_PUBLISHED'"
        self.until(lambda: self.sql(query) == str(runs_in_all))

    def _ready(self, queue: str) -> int:
        return int(self._administrator.queue_declare(queue, passive=True).method.message_count)

    def _parked(self, number: int) -> bool:
        return self._ready("closeout.parked") == number

    def consumers(self, queue: str) -> int:
        """Return how many consumers *queue* has; none if there is no such queue."""
        channel = self._administrator.connection.channel()
        try:
            found = channel.queue_declare(queue, passive=True).method.consumer_count
        except pika.exceptions.ChannelClosedByBroker:
            return 0
        channel.close()
        return int(found)

    # Events around the reader

    def grant_rights(self) -> None:
        grant_after_migration(self.postgres, self._database)

    def make_runs_stuck(self) -> None:
        """Three messages are parked; then the exchange of events is deleted, and no relay runs for minutes."""
        self.sql(
            "ALTER TABLE governance.incidents ADD CONSTRAINT unforeseen CHECK (agent_id <> 'nightly-report') NOT VALID"
        )
        bad = [b"{this is not JSON", globex(PARKED, tenant_id="no spaces allowed")]
        for number, body in enumerate([*bad, globex(PARKED, agent_id="nightly-report")], start=1):
            self.publish(body)
            self.until(partial(self._parked, number))
        self.publish(globex(DONE))
        self.until_published(7)  # the five that the contract's guide published, the subscriber's, and this one
        self._administrator.exchange_delete("governance.events")
        self.publish(*(globex(run_id, status="succeeded", error_code=None) for run_id in STRANDED))
        self.until_closed_out(*STRANDED)
        self._started[0].send_signal(signal.SIGSTOP)
        self._date_back("outbox_events", "17 min", "created_at")

    def resume_work(self) -> None:
        self._started[0].send_signal(signal.SIGCONT)

    def fix_the_cause(self) -> None:
        self.sql("ALTER TABLE governance.incidents DROP CONSTRAINT unforeseen")

    def age_a_run(self) -> None:
        self._date_back(
            "run_completions", "100 days", "received_at", "committed_at", where=f"WHERE run_id = '{STRANDED[0]}'"
        )

    def _date_back(self, table: str, interval: str, *columns: str, where: str = "") -> None:
        # Citus refuses timestamptz - interval in an UPDATE: that depends on the session's time zone.
        values = ", ".join(
            f"{column} = ({column} AT TIME ZONE 'UTC' - interval '{interval}') AT TIME ZONE 'UTC'" for column in columns
        )
        self.sql(f"UPDATE governance.{table} SET {values} {where}")

    def publish_events_twice(self) -> list[dict[str, Any]]:
        """Close a run out, publish its events once more under their ids, and return them."""
        listening, queue = self._channels[identities.SUBSCRIBER], "subscriber.again"
        listening.queue_declare(queue, durable=True)
        listening.queue_bind(queue, "governance.events", "#")
        self.publish(globex(LISTED.format(8), error_code="AGENT_CRASH"))
        self.until(lambda: self._ready(queue) == 3)
        bodies = [listening.basic_get(queue, auto_ack=True)[2] for _ in range(3)]
        events = [json.loads(body) for body in bodies]
        for event, body in zip(events, bodies, strict=True):
            keys = {"incident.created": "critical", "policy.evaluated": "no_violation", "run.finalized": "failed"}
            key = f"{event['type']}.{keys[event['type']]}"
            self.publish(body, identity=identities.WORKER, exchange="governance.events", key=key)
        return events
