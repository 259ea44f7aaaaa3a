"""Somebody who follows the README from top to bottom: a database, a vhost, a folder, a prompt, a worker.

Each command and program is run as the role and the user that are its own. What the README's story needs beside them
happens here: a cause that parks a message, an exchange that somebody deletes, hours that pass.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pika
from servers import PostgresServer, RabbitServer
from servers.ports import Port
from servers.postgres import SUPERUSER

from tests.acceptance import roles_of_commands as parts
from tests.acceptance.roles_of_commands import Part, part_of
from tests.acceptance.shell import Prompt, Said
from tests.support import roles
from tests.support import run_messages as runs

ROOT = Path(__file__).parents[2]
CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
PATIENCE = 30.0
NOT_INHERITED = {"COLUMNS", "LINES", "DATABASE_URL", "AMQP_URL"}
# The runs that the README names.
PARKED = "5b2f6f0e-6d0c-4a51-9c55-0a4f8a1b7d11"
DONE = "3c9e1a52-8f1d-4c1b-8a86-3d2f0e9b6c22"
STRANDED = ("7a8d2b64-1f3e-4d9a-b0c7-5e6f1a2b3c33", "9d4c3b75-2a4f-4e8b-a1d8-6f7a2b3c4d44")
LISTED = "2f1a9c3e-5b7d-4e6f-8a9b-{:012d}"


def globex(run_id: str, **changes: Any) -> bytes:
    fields = {"tenant_id": "globex", "run_id": run_id, "trace_id": None, "completed_at": "2026-11-01T12:00:30+00:00"}
    return runs.body(**{**fields, **changes})


class Reader:
    """One reading. Files that the README's commands name lie in *folder*."""

    def __init__(self, folder: Path, postgres: PostgresServer, rabbit: RabbitServer, name: str) -> None:
        self.folder, self._postgres, self._database = folder, postgres, name
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
            "DELIVERY_MAX_ATTEMPTS": "1",  # parked at once, where it would be a minute
            "LOG_LEVEL": "WARNING",
        }
        shutil.copytree(ROOT / "deploy" / "examples", folder / "deploy" / "examples")
        three = [("6.25", "succeeded"), ("0.4", "succeeded"), ("7.5", "failed")]
        lines = [
            runs.body(run_id=LISTED.format(number), status=status, usage={"cost_usd": float(cost)},
                      error_code="STEP_FAILURE" if status == "failed" else None)
            for number, (cost, status) in enumerate(three)
        ]  # fmt: skip
        lines.append(runs.body(completed_at="yesterday"))
        (folder / "runs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        (folder / "run.json").write_bytes(runs.body(run_id=LISTED.format(9), usage={"cost_usd": 6.25}))
        self.prompt = Prompt(folder, self.environ)
        self._started: list[subprocess.Popen[bytes]] = []
        # Whoever deletes exchanges, and looks how long a queue is.
        self._administrator = self._connect(self._urls["amqp_url"])
        self._channels = {part: self._open(part) for part in (parts.RUNNER, parts.WORKER, parts.SUBSCRIBER)}

    def close(self) -> None:
        self.prompt.close()
        for process in self._started:
            process.kill()
            process.wait(10)
        for channel in (self._administrator, *self._channels.values()):
            if channel.connection.is_open:
                channel.connection.close()

    def _open(self, part: Part) -> Any:
        """Return a channel of *part*'s user, which waits for confirms."""
        return self._connect(self._of(part)["AMQP_URL"])

    def _connect(self, url: str) -> Any:
        channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
        channel.confirm_delivery()
        return channel

    def _of(self, part: Part) -> dict[str, str]:
        return part.environ(**self._urls)

    # What a reader does

    def start(self, *words: str, part: Part) -> "subprocess.Popen[bytes]":
        """Start as *part* a command that goes on."""
        with (self.folder / f"{Path(words[-1]).stem}.log").open("ab") as log:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.environ | self._of(part), stdout=log, stderr=log
            )
        self._started.append(process)
        return process

    def started(self, number: int) -> "subprocess.Popen[bytes]":
        return self._started[number]

    def run(self, *words: str) -> Said:
        """Run a command to its end, ``closeout`` as the part that it is for; others have no server's address."""
        if words[0] == "closeout":
            return self.prompt.closeout(*words[1:], urls=self._of(part_of(words[1:])))
        return self.run_as(Part(None, None), *words)

    def run_as(self, part: Part, *words: str) -> Said:
        """Run a program to its end, as *part*."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environ | self._of(part), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
        )  # fmt: skip
        return Said(done.returncode, done.stdout)

    def sql(self, statement: str, *, role: str = SUPERUSER) -> str:
        return str(self._postgres.psql(statement, self._database, user=role)).strip()

    def publish(
        self, *bodies: bytes, part: Part = parts.RUNNER, exchange: str = "runs", key: str = "run.completed"
    ) -> None:
        for body in bodies:
            properties = pika.BasicProperties(content_type="application/json", delivery_mode=2)
            self._channels[part].basic_publish(exchange, key, body, properties, mandatory=True)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen in time; the worker said:\n{self.log('worker')}"
            time.sleep(0.05)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def until_closed_out(self, *run_ids: str) -> None:
        named = ", ".join(f"'{run_id}'" for run_id in run_ids)
        query = f"SELECT count(committed_at) FROM governance.run_completions WHERE run_id IN ({named})"
        self.until(lambda: self.sql(query) == str(len(run_ids)))

    def until_told(self, runs_in_all: int) -> None:
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

    # What happens to a reader

    def rights_are_granted(self) -> None:
        roles.grant_rights(self._postgres, self._database)

    def runs_get_stuck(self) -> None:
        """Three messages are parked; then somebody deletes the exchange of events, and no relay works for minutes."""
        self.sql(
            "ALTER TABLE governance.incidents ADD CONSTRAINT unforeseen CHECK (agent_id <> 'nightly-report') NOT VALID"
        )
        bad = [b"{this is not JSON", globex(PARKED, tenant_id="no spaces allowed")]
        for number, body in enumerate([*bad, globex(PARKED, agent_id="nightly-report")], start=1):
            self.publish(body)
            self.until(partial(self._parked, number))
        self.publish(globex(DONE))
        self.until_told(7)  # the five that the runner's guide published, the subscriber's, and this one
        self._administrator.exchange_delete("governance.events")
        self.publish(*(globex(run_id, status="succeeded", error_code=None) for run_id in STRANDED))
        self.until_closed_out(*STRANDED)
        self._started[0].send_signal(signal.SIGSTOP)
        self.sql("UPDATE governance.outbox_events SET created_at = created_at - interval '17 min'")

    def work_goes_on(self) -> None:
        self._started[0].send_signal(signal.SIGCONT)

    def the_cause_is_mended(self) -> None:
        self.sql("ALTER TABLE governance.incidents DROP CONSTRAINT unforeseen")

    def a_run_grows_old(self) -> None:
        self.sql(
            "UPDATE governance.run_completions SET received_at = received_at - interval '100 days',"
            f" committed_at = committed_at - interval '100 days' WHERE run_id = '{STRANDED[0]}'"
        )

    def events_come_again(self) -> list[dict[str, Any]]:
        """Close a run out, and publish its events once more, under their ids; return them."""
        listening, queue = self._channels[parts.SUBSCRIBER], "subscriber.again"
        listening.queue_declare(queue, durable=True)
        listening.queue_bind(queue, "governance.events", "#")
        self.publish(globex(LISTED.format(8), error_code="AGENT_CRASH"))
        self.until(lambda: self._ready(queue) == 3)
        bodies = [listening.basic_get(queue, auto_ack=True)[2] for _ in range(3)]
        events = [json.loads(body) for body in bodies]
        for event, body in zip(events, bodies, strict=True):
            keys = {"incident.created": "critical", "policy.evaluated": "no_violation", "run.finalized": "failed"}
            key = f"{event['type']}.{keys[event['type']]}"
            self.publish(body, part=parts.WORKER, exchange="governance.events", key=key)
        return events
