"""One demonstration on running servers: publish, watch the progress, report."""

import asyncio
import os
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from aiormq import spec
from aiormq.abc import DeliveredMessage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from servers.process import ServerError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import EVENTS_EXCHANGE, PARKED_QUEUE, REASON_HEADER, RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import decode
from consumer.postgres.engine import create_engine
from demo_run.report import Received, report
from demo_run.setup import CLOSEOUT
from domains.run import CompletedRun, RunKey

DEADLINE_SECONDS = 90.0  # to close out all runs; a thousand take about two seconds
WINDOW = 200

console = Console(highlight=False, soft_wrap=True)


class Demonstration:
    """A worker, a publisher and a subscriber on running servers."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.port = _free_port()
        self.environment = {
            **environment,
            "TRANSACTION_COORDINATOR_ENABLED": "true",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(self.port),
        }
        self.log = folder / "worker.log"
        self.engine: AsyncEngine = create_engine(environment["DATABASE_URL"])
        self.broker = BrokerConnection(environment["AMQP_URL"], name="closeout demo")
        self.received = Received()
        self.published_at: dict[RunKey, float] = {}

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """Start a worker that logs to a file."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [CLOSEOUT, "worker"], env={**os.environ, **self.environment}, stderr=log, start_new_session=True
            )

    def await_ready(self) -> None:
        """Return when the worker is ready; raise ServerError with the end of its log otherwise."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                return
            time.sleep(0.05)
        raise ServerError(f"the worker did not become ready: {self.log.read_text()[-2000:]}")

    async def run(self, bodies: Sequence[bytes], runs: Sequence[CompletedRun]) -> list[str]:
        """Publish *bodies*, show the progress of *runs* and report; return one line per incomplete run."""
        await self._subscribe()
        with Progress(
            TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), console=console
        ) as progress:
            committing = progress.add_task("committed", total=len(runs))
            finishing = progress.add_task("events sent", total=len(runs))
            sent = progress.add_task("published", total=len(bodies))
            publishing = asyncio.create_task(self._publish(bodies, lambda: progress.advance(sent)))
            deadline = time.monotonic() + DEADLINE_SECONDS
            finished = 0
            while finished < len(runs) and time.monotonic() < deadline:
                committed, finished = await self._progress()
                progress.update(committing, completed=committed)
                progress.update(finishing, completed=finished)
                await asyncio.sleep(0.1)
            await publishing
        duplicates = await self._duplicates(len(bodies) - len(runs))
        extra = {"duplicates": {"acked, nothing written": duplicates}, "parked": await self._parked()}
        try:
            return await report(
                self.engine, console, runs=runs, published_at=self.published_at, received=self.received, extra=extra
            )
        finally:
            await self.broker.close()
            await self.engine.dispose()

    async def _subscribe(self) -> None:
        channel = await self.broker.channel(confirms=False)
        queue = (await channel.queue_declare("", exclusive=True)).queue or ""
        await channel.queue_bind(queue, EVENTS_EXCHANGE, routing_key="#")
        await channel.basic_consume(queue, self._on_event, no_ack=True)

    async def _on_event(self, message: DeliveredMessage) -> None:
        properties, seen = message.header.properties, self.received
        seen.deliveries += 1
        if properties.message_id not in seen.ids:
            seen.ids.add(str(properties.message_id))
            seen.types[str(properties.message_type)] += 1
            seen.by_run[UUID(properties.correlation_id)].append(str(properties.message_type))

    async def _publish(self, bodies: Sequence[bytes], advance: Callable[[], None]) -> None:
        channel = ConfirmedChannel(self.broker)
        window = asyncio.Semaphore(WINDOW)

        async def send(body: bytes) -> None:
            async with window:
                with suppress(MessageRefusedError):
                    self.published_at.setdefault(decoded(body).key, time.time())
                await channel.send(
                    exchange=RUNS_EXCHANGE,
                    routing_key=RUN_COMPLETED_KEY,
                    body=body,
                    properties=spec.Basic.Properties(content_type="application/json", delivery_mode=2),
                )
                advance()

        await asyncio.gather(*map(send, bodies))

    async def _progress(self) -> tuple[int, int]:
        query = "SELECT count(committed_at), count(events_published_at) FROM governance.run_completions"
        async with self.engine.connect() as conn:
            committed, finished = (await conn.execute(text(query))).one()
        return committed, finished

    async def _duplicates(self, others: int) -> int:
        """Return how many duplicates the worker acked, once it has settled *others*, the messages without a new run."""
        duplicates = 0
        for _ in range(50):
            duplicates = await asyncio.to_thread(self._metric, 'closeout_deliveries_total{result="duplicate"}')
            parked = await asyncio.to_thread(self._metric, 'closeout_deliveries_total{result="parked"}')
            if duplicates + parked >= others:
                break
            await asyncio.sleep(0.1)
        return duplicates

    def _metric(self, name: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(name):
                    return int(float(line.rpartition(" ")[2]))
        return 0

    async def _parked(self) -> dict[str, int]:
        """Return the number of parked messages by reason, most frequent first; they stay in the queue, not acked."""
        channel = await self.broker.channel(confirms=False)
        reasons: Counter[str] = Counter()
        while (message := await channel.basic_get(PARKED_QUEUE)).delivery_tag is not None:
            reasons[str((message.header.properties.headers or {}).get(REASON_HEADER))] += 1
        await channel.close()
        return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def decoded(body: bytes) -> CompletedRun:
    """Return the run in *body*; raise ``MessageRefusedError`` if the worker would park it."""
    return decode(body, max_bytes=1_048_576).run
