"""Run workers under load and random faults, then check that every run was closed out exactly once."""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from demo_run.setup import closeout, set_up
from rich.console import Console
from servers import PostgresServer, RabbitServer
from servers.clusters.citus import PROGRAMS, CitusServer
from servers.process import ServerError
from servers.service_pair import end_on_signals, running_pair
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.contract.names import PARKED_QUEUE
from consumer.postgres.engine import DATABASE_ERRORS, create_engine
from soak_run.fault_injector import FaultInjector
from soak_run.invariant_checks import Verdict, check_memory, compare
from soak_run.schedule import Fault, schedule
from soak_run.traffic import EVENTS_QUEUE, Publishing, Subscriber, declare_events_queue, publish, subscribe
from soak_run.worker_processes import WorkerProcesses

DRAIN_SECONDS = 180.0  # after the last fault: confirm time-outs, the relay's grace period, the backlog
PROGRESS_SECONDS = 15.0

console = Console(highlight=False, soft_wrap=True, stderr=True)


class Soak:
    """One soak on running servers."""

    def __init__(
        self, postgres: PostgresServer, rabbit: RabbitServer, environment: dict[str, str], folder: Path, workers: int
    ) -> None:
        self.postgres, self.rabbit = postgres, rabbit
        self.environment = {
            **environment,
            "TRANSACTION_COORDINATOR_ENABLED": "true",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": "0",
        }
        self.amqp_url = environment["AMQP_URL"]
        logs = folder / "logs"
        logs.mkdir()
        self.workers = WorkerProcesses(workers, self.environment, logs)
        nodes = postgres.nodes if isinstance(postgres, CitusServer) else [postgres]
        self.injector = FaultInjector(
            self.workers, postgres, nodes, rabbit, lambda line: console.print(line, markup=False)
        )
        self.published, self.subscriber, self.verdict = Publishing(), Subscriber(), Verdict()
        self.engine: AsyncEngine = create_engine(environment["DATABASE_URL"], pool_size=1)

    async def run(self, faults: list[Fault], *, seconds: float, seed: int, rate: float) -> Verdict:
        """Publish and inject *faults* for *seconds*, wait until all messages are processed, and check."""
        try:
            await asyncio.to_thread(set_up, self.environment)
            if isinstance(self.postgres, CitusServer):
                await asyncio.to_thread(closeout, self.environment, "distribute")
            await declare_events_queue(self.amqp_url)
            await asyncio.to_thread(self.rabbit.sync)  # a queue declared just before a kill would not survive it
            started = time.monotonic()
            self.workers.start()
            async with asyncio.TaskGroup() as group:
                background = [
                    group.create_task(work)
                    for work in (
                        self.workers.watch(),
                        subscribe(self.amqp_url, self.subscriber),
                        self._print_progress(started),
                    )
                ]
                await self._inject(faults, started=started, seconds=seconds, seed=seed, rate=rate)
                for task in background:
                    task.cancel()
            await self.workers.stop()
            await self._check(time.monotonic() - started)
            return self.verdict
        finally:
            self.workers.kill_all()
            # A thread that starts a server would delay the exit.
            self.rabbit.abort_start()
            self.postgres.abort_start()
            await self.engine.dispose()

    async def _inject(self, faults: list[Fault], *, started: float, seconds: float, seed: int, rate: float) -> None:
        stopping = asyncio.Event()
        publishing = asyncio.create_task(publish(self.amqp_url, seed, rate, stopping, self.published))
        try:
            injecting = asyncio.create_task(self.injector.run(faults, started))
            await asyncio.wait({injecting, publishing}, return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():  # only a failure ends it this early
                injecting.cancel()
                await publishing
            await injecting
            await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
            stopping.set()
            console.print("no more faults; draining")
            drain_started = time.monotonic()
            async with asyncio.timeout(DRAIN_SECONDS):
                await publishing
                while not await self._drained():
                    await asyncio.sleep(0.5)
            self.verdict.counts["drain time, s"] = round(time.monotonic() - drain_started, 1)
        except TimeoutError:
            self.verdict.violations.append(f"not drained within {DRAIN_SECONDS:.0f} s of the last fault")
        finally:
            publishing.cancel()
            with suppress(asyncio.CancelledError):
                await publishing

    async def _drained(self) -> bool:
        """Return whether all events of all runs are published and all queues but the parked one are empty."""
        if await self._finished_runs() < len(self.published.runs):
            return False
        queues = await asyncio.to_thread(self._queues)
        return not sum(count for queue, count in queues.items() if queue != PARKED_QUEUE)

    async def _finished_runs(self) -> int:
        try:
            async with self.engine.connect() as conn:
                query = text("SELECT count(events_published_at) FROM governance.run_completions")
                return int((await conn.execute(query)).scalar_one())
        except DATABASE_ERRORS:
            return -1

    def _queues(self) -> dict[str, int]:
        lines = self.rabbit.ctl("list_queues", "--no-table-headers", "name", "messages").splitlines()
        return {name: int(count) for name, _, count in (line.partition("\t") for line in lines)}

    async def _print_progress(self, started: float) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            console.print(
                f"{time.monotonic() - started:6.1f} s  {len(self.published.runs):,} runs published, "
                f"{self.subscriber.complete:,} with all events",
                style="bold",
            )

    async def _check(self, duration: float) -> None:
        verdict = self.verdict
        reconcile = ("reconcile", "--json", "--older-than", "5s")
        output = await asyncio.to_thread(closeout, self.environment, *reconcile, accepted=(0, 1))
        for rule in json.loads(output)["invariants"]:
            runs = ", ".join(f"{run['tenant_id']}/{run['run_id']} ({run['detail']})" for run in rule["runs"][:5])
            verdict.require(not rule["broken"], f"reconcile: {rule['name']}: {rule['broken']} runs: {runs}")
        await compare(self.engine, self.published, self.subscriber, verdict)
        queues = await asyncio.to_thread(self._queues)
        verdict.counts["parked"] = queues[PARKED_QUEUE]
        verdict.require(not queues[PARKED_QUEUE], f"{queues[PARKED_QUEUE]} messages were parked")
        left = {queue: count for queue, count in queues.items() if count and queue not in {PARKED_QUEUE, EVENTS_QUEUE}}
        verdict.require(not left, f"queues are not empty: {left}")
        check_memory(self.workers.memory, verdict)
        verdict.counts["duration, s"] = round(duration)
        verdict.counts["worker processes started"] = self.workers.starts
        verdict.counts |= {f"fault: {fault}": count for fault, count in sorted(self.injector.done.items())}
        verdict.counts |= {f"logged error: {event}": n for event, n in self.workers.logged_errors().most_common(10)}
        verdict.violations += self.workers.faults
        verdict.violations += [f"a fault could not be injected: {failure}" for failure in self.injector.failures]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="duration of faults and traffic (default: 10)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="repeat the same faults")
    parser.add_argument(
        "--workers", type=int, default=3, help="worker processes; number 0 is never killed (default: 3)"
    )
    parser.add_argument("--rate", type=float, default=200.0, help="runs published per second (default: 200)")
    parser.add_argument("--rabbitmq", choices=("3.10", "4"), default="4", help="RabbitMQ version (default: 4)")
    parser.add_argument(
        "--citus", action="store_true", help=f"a Citus cluster instead of one PostgreSQL; needs {PROGRAMS}"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="copy the workers' logs to this folder")
    options = parser.parse_args()
    if options.workers < 1 or options.minutes <= 0 or options.rate <= 0:
        parser.error("--workers, --minutes and --rate must be positive")
    return options


def main() -> int:
    """Parse the command line and run the soak; return 1 if an invariant was violated."""
    options = _options()
    faults = schedule(seconds=options.minutes * 60, seed=options.seed, workers=options.workers)
    again = f"scripts/soak --minutes {options.minutes:g} --seed {options.seed} --workers {options.workers}"
    cluster = " --citus" if options.citus else ""
    console.print(f"{again} --rate {options.rate:g} --rabbitmq {options.rabbitmq}{cluster}\n{len(faults)} faults:")
    console.print("\n".join(map(str, faults)), markup=False)
    end_on_signals()
    # Each kill would otherwise fill a screen with the errors of this process's clients.
    for name in ("aiormq", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="closeout-soak-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may have to run as another user
            database = CitusServer if options.citus else PostgresServer
            with running_pair(folder / "servers", options.rabbitmq, management=False, database=database) as (
                postgres,
                rabbit,
                environment,
            ):
                soak = Soak(postgres, rabbit, environment, folder, options.workers)
                try:
                    verdict = asyncio.run(
                        soak.run(faults, seconds=options.minutes * 60, seed=options.seed, rate=options.rate)
                    )
                finally:
                    if options.logs is not None:
                        options.logs.mkdir(parents=True, exist_ok=True)
                        for log in soak.workers.logs.iterdir():
                            (options.logs / log.name).write_bytes(log.read_bytes())
    except ServerError as error:
        console.print(f"soak: {error}", style="red", markup=False)
        return 1
    verdict.print(Console(highlight=False, soft_wrap=True), as_json=options.json)
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
