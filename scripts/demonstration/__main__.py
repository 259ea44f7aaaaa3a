"""The demonstration's flow, from servers to verdict."""

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from aiormq import spec
from aiormq.abc import DeliveredMessage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from servers import background
from servers.pair import end_on_signals, running_pair
from servers.process import ServerError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.broker import BrokerConnection
from consumer.database import create_engine
from consumer.errors import MessageRefusedError
from consumer.message import decode
from consumer.parking import PARKED_QUEUE, REASON
from consumer.publisher import EVENTS_EXCHANGE, ConfirmedChannel
from consumer.topology import RUN_COMPLETED_KEY, RUNS_EXCHANGE
from demonstration.report import Received, report
from demonstration.runs import realistic_runs
from domains.run import CompletedRun, RunKey

HERE = Path(__file__).parent
CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
KEPT = Path(tempfile.gettempdir()) / f"closeout-demo-{os.getuid()}"
NUMBER, RESENT = 1_000, 20
BROKEN = (b"{this is not JSON", b'{"schema_version": 7}', b'{"schema_version": 1, "tenant_id": "no spaces allowed"}')
# Seconds until every run must be closed out; a thousand take about two.
PATIENCE = 90.0
WINDOW = 200

console = Console(highlight=False, soft_wrap=True)


class Demonstration:
    """One demonstration on servers that are up."""

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
        self.broker = BrokerConnection(environment["AMQP_URL"], name="demonstration")
        self.received = Received()
        self.published_at: dict[RunKey, float] = {}

    def closeout(self, *words: str) -> None:
        """Run a closeout command, quietly unless it fails."""
        done = subprocess.run(
            [CLOSEOUT, *words], env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ServerError(f"closeout {' '.join(words)}: {done.stdout}{done.stderr}")

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """Start a worker whose log goes to a file."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [CLOSEOUT, "worker"], env={**os.environ, **self.environment}, stderr=log, start_new_session=True
            )

    def await_ready(self) -> None:
        """Return once the worker consumes."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                return
            time.sleep(0.05)
        raise ServerError(f"the worker did not become ready: {self.log.read_text()[-2000:]}")

    async def run(self, bodies: Sequence[bytes], runs: Sequence[CompletedRun]) -> list[str]:
        """Publish *bodies*, watch *runs* being closed out, report; return what is wrong."""
        await self._subscribe()
        with Progress(
            TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), console=console
        ) as progress:
            shown = [progress.add_task(word, total=len(runs)) for word in ("committed", "told")]
            sent = progress.add_task("published", total=len(bodies))
            sending = asyncio.create_task(self._publish(bodies, lambda: progress.advance(sent)))
            deadline = time.monotonic() + PATIENCE
            told = 0
            while told < len(runs) and time.monotonic() < deadline:
                committed, told = await self._progress()
                progress.update(shown[0], completed=committed)
                progress.update(shown[1], completed=told)
                await asyncio.sleep(0.1)
            await sending
        duplicates = await self._duplicates(len(bodies) - len(runs) - len(BROKEN))
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
                    self.published_at.setdefault(_decoded(body).key, time.time())
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
            committed, told = (await conn.execute(text(query))).one()
        return committed, told

    async def _duplicates(self, expected: int) -> int:
        """Return how many duplicates the worker acked, waiting a little for the last of them."""
        found = -1
        for _ in range(50):
            found = await asyncio.to_thread(self._metric, 'closeout_deliveries_total{result="duplicate"}')
            if found >= expected:
                break
            await asyncio.sleep(0.1)
        return max(found, 0)

    def _metric(self, name: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(name):
                    return int(float(line.rpartition(" ")[2]))
        return 0

    async def _parked(self) -> dict[str, int]:
        """Return the reasons of what lies in the parked queue; reading it without an ack leaves it there."""
        channel = await self.broker.channel(confirms=False)
        reasons: Counter[str] = Counter()
        while (message := await channel.basic_get(PARKED_QUEUE)).delivery_tag is not None:
            reasons[str((message.header.properties.headers or {}).get(REASON))] += 1
        await channel.close()
        return dict(reasons)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _decoded(body: bytes) -> CompletedRun:
    return decode(body, max_bytes=1_048_576).run


def _messages(file: Path | None, seed: int) -> tuple[list[bytes], list[CompletedRun]]:
    """Return what to publish and which runs must be closed out."""
    if file is not None:
        bodies = [line.strip() for line in file.read_bytes().splitlines() if line.strip()]
    else:
        bodies = realistic_runs(NUMBER, seed)
        # As a runner that lost a confirm does: some messages come twice. And a few that nobody can process.
        bodies += [*random.Random(seed).sample(bodies, RESENT), *BROKEN]  # noqa: S311 - for variety
    runs: dict[RunKey, CompletedRun] = {}
    for body in bodies:
        with suppress(MessageRefusedError):
            run = _decoded(body)
            runs.setdefault(run.key, run)
    return bodies, list(runs.values())


def demonstrate(environment: dict[str, str], folder: Path, options: argparse.Namespace) -> int:
    """Show it; return the exit status. With --keep the worker is left running."""
    bodies, runs = _messages(options.file, options.seed)
    show = Demonstration(environment, folder)
    with ThreadPoolExecutor() as together:
        declared = together.submit(show.closeout, "topology")
        show.closeout("migrate")
        applied = together.submit(show.closeout, "policies", "apply", str(HERE / "policies.yaml"))
        declared.result()
        worker = show.start_worker()  # it would wait for what is missing, but looks only once a second
        applied.result()
    try:
        show.await_ready()
        console.print(f"worker {worker.pid} is up; publishing {len(bodies):,} messages about {len(runs):,} runs\n")
        faults = asyncio.run(show.run(bodies, runs))
    finally:
        if not options.keep:
            worker.send_signal(signal.SIGTERM)
            status = worker.wait(30)
            console.print(f"the worker was told to stop, drained and exited {status}")
    for fault in faults[:20]:
        console.print(f"[red]INCOMPLETE[/red] {fault}")
    console.print(
        f"[bold]{'every run is complete' if not faults else 'NOT every run is complete'}[/bold]: "
        f"{len(runs) - len({fault.split(':')[0] for fault in faults}):,} of {len(runs):,}"
    )
    if options.keep:
        (folder / "worker.pid").write_text(str(worker.pid))
        _say_how_to_look_around(show, runs)
    return 1 if faults else 0


def _say_how_to_look_around(show: Demonstration, runs: Sequence[CompletedRun]) -> None:
    exports = "\n".join(f"  export {name}={value!r}" for name, value in show.environment.items())
    console.print(
        f"\nIt all keeps running. To look around:\n{exports}\n"
        f"  .venv/bin/closeout runs list\n"
        f"  .venv/bin/closeout runs show {runs[0].tenant_id}/{runs[0].run_id}\n"
        f"  .venv/bin/closeout policies list\n"
        f"  curl http://127.0.0.1:{show.port}/metrics   # and /readyz\n"
        f"  tail -f {show.log}\n"
        f"and to end it: scripts/demo --stop",
        soft_wrap=True,
    )


def stop() -> int:
    """End what --keep left running."""
    with suppress(OSError, ValueError):
        os.kill(int((KEPT / "worker.pid").read_text()), signal.SIGTERM)
        (KEPT / "worker.pid").unlink()
    console.print("stopped" if background.down(KEPT / "servers") else "nothing was running")
    return 0


def main() -> int:
    """Parse the command line and demonstrate."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.jsonl", help="runs to publish; else 1,000 made up")
    parser.add_argument("--keep", action="store_true", help="leave servers and worker running, and say how to look")
    parser.add_argument("--stop", action="store_true", help="end what --keep left running")
    parser.add_argument("--rabbitmq", choices=("3.10", "4"), default="4", help="which RabbitMQ (default: 4)")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="make up the same runs again")
    options = parser.parse_args()
    if options.file is not None and not options.file.is_file():
        parser.error(f"{options.file} is not a file")
    try:
        if options.stop:
            return stop()
        console.print("starting a private PostgreSQL and a private RabbitMQ")
        if options.keep:
            KEPT.mkdir(mode=0o700, exist_ok=True)
            state = background.up(KEPT / "servers", options.rabbitmq, management=False)
            return demonstrate(state.environment, KEPT, options)
        end_on_signals()
        with tempfile.TemporaryDirectory(prefix="closeout-demo-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may have to run as another user
            with running_pair(folder / "servers", options.rabbitmq, management=False) as (*_, environment):
                return demonstrate(environment, folder, options)
    except ServerError as error:
        console.print(f"[red]demo: {error}[/red]")
        return 1


if __name__ == "__main__":
    sys.exit(main())
