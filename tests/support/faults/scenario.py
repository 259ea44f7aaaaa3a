"""A runner that publishes through every fault, a worker behind two proxies, and the invariants that must hold."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from aiormq import spec
from servers import PostgresServer, RabbitServer

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import (
    EVENTS_EXCHANGE,
    RUN_COMPLETED_KEY,
    RUNS_EXCHANGE,
    consumed_queues,
)
from consumer.errors import UnavailableError
from consumer.postgres.privileges import each_privilege
from tests.support import run_messages as runs
from tests.support import traffic
from tests.support.command_line import CLOSEOUT
from tests.support.faults.proxy import Proxy
from tests.support.faults.running_worker import RunningWorker
from tests.support.roles import WORKER_USER, permit
from tests.support.waiting import PATIENCE, until

SUBSCRIBER = "subscriber"
# Lines of a worker's log that a test shows if it fails.
LOG_LINES_PRINTED = 60


class Scenario:
    """One database and one vhost, each behind a proxy, with a role and a user for the worker only."""

    def __init__(self, postgres: PostgresServer, rabbit: RabbitServer, database: str, vhost: str, folder: Path) -> None:
        self.postgres, self.rabbit, self.database, self.vhost, self._folder = postgres, rabbit, database, vhost, folder
        self.role, self.user = f"worker_{database}", f"worker-{vhost}"
        self.database_proxy, self.broker_proxy = Proxy(postgres.port), Proxy(rabbit.port)
        self.broker = BrokerConnection(rabbit.url(vhost), name="runner")
        self.bodies: list[bytes] = []
        self.intake_queues = 1
        # Ids of events that were found in the outbox and must be published under these ids.
        self.must_be_published: set[str] = set()
        self._channel: ConfirmedChannel | None = None
        self._workers: list[RunningWorker] = []

    async def set_up(self) -> None:
        await self.sql(f"CREATE ROLE {self.role} LOGIN; GRANT USAGE ON SCHEMA governance TO {self.role}")
        await self.grant()
        await self.in_thread(self.rabbit.add_user, self.user, "pw", "^$", "^$", "^$", self.vhost)
        await self.in_thread(partial(permit, self.rabbit, self.vhost, WORKER_USER, name=self.user))
        await self.subscribe()
        await self.database_proxy.accept()
        await self.broker_proxy.accept()

    async def grant(self) -> None:
        """Grant the worker's privileges on the columns that exist, as ``rights.sql`` does after each migration."""
        columns = "SELECT table_name || '.' || column_name FROM information_schema.columns"
        existing = set((await self.sql(f"{columns} WHERE table_schema = 'governance'")).split())
        rights = [
            right for right in each_privilege() if not right.column or f"{right.table}.{right.column}" in existing
        ]
        await self.sql("; ".join(f"GRANT {right} ON governance.{right.table} TO {self.role}" for right in rights))

    async def take_down(self) -> None:
        for number, worker in enumerate(self._workers):
            if worker.alive:
                await worker.kill()
            # pytest shows it only where a test fails.
            print(f"log of worker {number}:", *worker.lines()[-LOG_LINES_PRINTED:], sep="\n")  # noqa: T201
        self.database_proxy.close()
        self.broker_proxy.close()
        await self.broker.close()

    @staticmethod
    async def in_thread(call: Any, *arguments: Any) -> Any:
        """Call a blocking function in a thread: the proxies run in this event loop."""
        return await asyncio.to_thread(call, *arguments)

    # The worker

    @property
    def environ(self) -> dict[str, str]:
        return {
            "DATABASE_URL": f"postgresql://{self.role}@127.0.0.1:{self.database_proxy.port}/{self.database}",
            "AMQP_URL": f"amqp://{self.user}:pw@127.0.0.1:{self.broker_proxy.port}/{self.vhost}",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": "0",
            "TRANSACTION_COORDINATOR_ENABLED": "true",
        }

    @contextlib.asynccontextmanager
    async def worker(self, *, in_process: bool = False, **environ: str) -> AsyncIterator[RunningWorker]:
        """Run a worker; it must be alive at the end, and stop on SIGTERM."""
        if in_process:
            more = {k: v for k, v in self.environ.items() if k not in {"DATABASE_URL", "AMQP_URL"}}
            async with traffic.worker(
                self.environ["DATABASE_URL"], self.environ["AMQP_URL"], **(more | environ)
            ) as service:
                yield RunningWorker(service.http.port)
                assert not service.worker.stopping.is_set()
            return
        running = await self.start(**environ)
        yield running
        assert running.alive, "the worker exited unexpectedly"
        assert await running.stop() == 0

    async def start(self, *, command: Sequence[str] = (CLOSEOUT,), **environ: str) -> RunningWorker:
        """Start a worker process by *command*; it is killed at the end of the scenario at the latest."""
        log = self._folder / f"worker-{len(self._workers)}.log"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *command, "worker", env={**os.environ, **self.environ, **environ}, stderr=errors
            )
        running = RunningWorker(0, process, log)
        self._workers.append(running)
        await running.find_port()
        return running

    # Messages in

    async def publish(self, number: int = 1) -> list[bytes]:
        """Publish *number* new runs, each again until it is confirmed, as runners must."""
        bodies = [runs.body() for _ in range(number)]
        for body in bodies:
            await self.publish_body(body)
        return bodies

    async def publish_body(self, body: bytes) -> None:
        self.bodies.append(body)
        properties = spec.Basic.Properties(content_type="application/json", delivery_mode=2)
        while True:
            try:
                if self._channel is None:
                    self._channel = ConfirmedChannel(self.broker)
                await self._channel.send(
                    exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=body, properties=properties
                )
            except UnavailableError:
                await asyncio.sleep(0.1)
            else:
                return

    @contextlib.asynccontextmanager
    async def load(self, *, pause: float = 0.04) -> AsyncIterator[None]:
        """Publish runs continuously."""
        enough = asyncio.Event()

        async def keep_on() -> None:
            while not enough.is_set():
                await self.publish(1)
                await asyncio.sleep(pause)

        runner = asyncio.create_task(keep_on())
        try:
            yield
            enough.set()
            await asyncio.wait_for(runner, PATIENCE)
        finally:
            runner.cancel()

    # State

    async def sql(self, statement: str) -> str:
        return str(await self.in_thread(self.postgres.psql, statement, self.database)).strip()

    async def count(self, table: str, where: str = "true") -> int:
        return int(await self.sql(f"SELECT count(*) FROM governance.{table} WHERE {where}"))

    async def unacked(self) -> int:
        """Return the number of unacked deliveries of the intake queues, as the queues count them."""
        queues = ", ".join(f'<<"{queue}">>' for queue in consumed_queues(self.intake_queues))
        response = await self.in_thread(
            self.rabbit.eval,
            "lists:sum([begin"
            f' {{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{self.vhost}">>, queue, Name)),'
            " {ok, {_, Held}, _} ="
            " ra:local_query(amqqueue:get_pid(Q), fun rabbit_fifo:query_messages_checked_out/1),"
            f" Held end || Name <- [{queues}]])",
        )
        return int(response)

    @staticmethod
    async def until(condition: Any, *, within: float = PATIENCE, what: str = "the condition") -> float:
        """Wait until *condition* holds and return the seconds it took; a server may be unreachable meanwhile."""
        started = monotonic()
        await until(condition, within=within, every=0.03, what=what, ignoring=OSError)
        return monotonic() - started

    async def phase_count(self, phase: str = "EVENTS_PUBLISHED") -> int:
        return await self.count("run_completions", f"phase = '{phase}'")

    async def subscribe(self) -> None:
        channel = await self.broker.channel(confirms=False)
        await channel.queue_declare(SUBSCRIBER, durable=True)
        await channel.queue_bind(SUBSCRIBER, EVENTS_EXCHANGE, routing_key="#")
        await channel.close()

    async def events(self) -> list[tuple[str, str, str]]:
        """Consume the subscriber's queue: run id, type and event id of each event, in order."""
        channel = await self.broker.channel(confirms=False)
        expected = (await channel.queue_declare(SUBSCRIBER, durable=True, passive=True)).message_count or 0
        found: list[tuple[str, str, str]] = []
        enough = asyncio.Event()

        async def on_event(message: Any) -> None:
            properties = message.header.properties
            found.append((properties.correlation_id, properties.message_type, properties.message_id))
            assert json.loads(message.body)["id"] == properties.message_id
            if len(found) == expected:
                enough.set()

        if expected:
            await channel.basic_consume(SUBSCRIBER, on_event, no_ack=True)
            await asyncio.wait_for(enough.wait(), PATIENCE)
        await channel.close()
        return found

    async def length(self, queue: str) -> int:
        channel = await self.broker.channel(confirms=False)
        count = (await channel.queue_declare(queue, passive=True)).message_count or 0
        await channel.close()
        return count

    async def all_closed_out(self, *, within: float = PATIENCE) -> float:
        """Wait until every published run is closed out with its events published; return the seconds it took."""
        expected = len({runs.run_id_of(body) for body in self.bodies})

        async def done() -> bool:
            return await self.phase_count() >= expected

        return await self.until(done, within=within, what=f"closing out {expected} runs")
