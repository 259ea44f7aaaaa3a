"""The soak's flow: servers, workers, traffic, storm, calm, verdict."""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from servers import PostgresServer, RabbitServer
from servers.process import ServerError
from servers.service_pair import end_on_signals, running_pair
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.contract.names import PARKED_QUEUE
from consumer.postgres.engine import DATABASE_ERRORS, create_engine
from soak_run.fault_injector import Storm
from soak_run.invariant_checks import Verdict, compare, judge_memory
from soak_run.schedule import Fault, schedule
from soak_run.traffic import EVENTS_QUEUE, Hearing, Publishing, declare_events_queue, publish, subscribe
from soak_run.worker_processes import CLOSEOUT, Fleet

# Seconds for everything to drain after the storm: a confirm that is waited for, the relay's grace, the backlog.
DRAIN_SECONDS = 180.0
SAY_SECONDS = 15.0
POLICIES = Path(__file__).parent.parent / "demo_run" / "policies.yaml"

console = Console(highlight=False, soft_wrap=True, stderr=True)


class Soak:
    """One soak on servers that are up."""

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
        logs = folder / "logs"
        logs.mkdir()
        self.fleet = Fleet(workers, self.environment, logs)
        self.storm = Storm(self.fleet, postgres, rabbit, lambda words: console.print(words, markup=False))
        self.published, self.heard, self.verdict = Publishing(), Hearing(), Verdict()
        self.engine: AsyncEngine = create_engine(environment["DATABASE_URL"], pool_size=1)

    def closeout(self, *words: str, ok: tuple[int, ...] = (0,)) -> str:
        """Run a closeout command and return what it prints."""
        done = subprocess.run(
            [CLOSEOUT, *words], env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        if done.returncode not in ok:
            raise ServerError(f"closeout {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    async def run(self, faults: list[Fault], *, seconds: float, seed: int, rate: float) -> Verdict:
        """Soak for *seconds*, let everything drain, and judge."""
        try:
            await self._prepare()
            started = time.monotonic()
            self.fleet.start()
            async with asyncio.TaskGroup() as group:
                background = [
                    group.create_task(work)
                    for work in (
                        self.fleet.watch(),
                        subscribe(self.environment["AMQP_URL"], self.heard),
                        self._say(started),
                    )
                ]
                await self._weather(faults, started=started, seconds=seconds, seed=seed, rate=rate)
                for task in background:
                    task.cancel()
            await self.fleet.stop()
            await self._judge(time.monotonic() - started)
            return self.verdict
        finally:
            self.fleet.end()
            # A server that is being started in a thread would keep us waiting for it.
            self.rabbit.abort_start()
            self.postgres.abort_start()
            await self.engine.dispose()

    async def _prepare(self) -> None:
        for words in (("migrate",), ("topology",), ("policies", "apply", str(POLICIES))):
            await asyncio.to_thread(self.closeout, *words)
        await declare_events_queue(self.environment["AMQP_URL"])
        await asyncio.to_thread(self.rabbit.sync)  # a queue declared just before a kill would not survive it

    async def _weather(self, faults: list[Fault], *, started: float, seconds: float, seed: int, rate: float) -> None:
        stopping = asyncio.Event()
        sending = asyncio.create_task(publish(self.environment["AMQP_URL"], seed, rate, stopping, self.published))
        try:
            storm = asyncio.create_task(self.storm.blow(faults, started))
            await asyncio.wait({storm, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():  # it was not told to stop, so it failed
                storm.cancel()
                await sending
            await storm
            await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
            stopping.set()
            console.print("the storm is over; draining")
            calm = time.monotonic()
            async with asyncio.timeout(DRAIN_SECONDS):
                await sending
                while not await self._drained():
                    await asyncio.sleep(0.5)
            self.verdict.counts["drained after, s"] = round(time.monotonic() - calm, 1)
        except TimeoutError:
            self.verdict.violations.append(f"not drained within {DRAIN_SECONDS:.0f} s of the last fault")
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    async def _drained(self) -> bool:
        """Say whether every run is told, and no message is under way at all."""
        if await self._told() < len(self.published.runs):
            return False
        waiting = await asyncio.to_thread(self._queues)
        return not sum(count for queue, count in waiting.items() if queue != PARKED_QUEUE)

    async def _told(self) -> int:
        try:
            async with self.engine.connect() as conn:
                query = text("SELECT count(events_published_at) FROM governance.run_completions")
                return int((await conn.execute(query)).scalar_one())
        except DATABASE_ERRORS:
            return -1

    def _queues(self) -> dict[str, int]:
        lines = self.rabbit.ctl("list_queues", "--no-table-headers", "name", "messages").splitlines()
        return {name: int(count) for name, _, count in (line.partition("\t") for line in lines)}

    async def _say(self, started: float) -> None:
        while True:
            await asyncio.sleep(SAY_SECONDS)
            console.print(
                f"{time.monotonic() - started:6.1f} s  {len(self.published.runs):,} runs published, "
                f"{self.heard.complete:,} with all events",
                style="bold",
            )

    async def _judge(self, lasted: float) -> None:
        verdict = self.verdict
        told = json.loads(
            await asyncio.to_thread(self.closeout, "reconcile", "--json", "--older-than", "5s", ok=(0, 1))
        )
        for rule in told["invariants"]:
            named = ", ".join(f"{run['tenant_id']}/{run['run_id']} ({run['detail']})" for run in rule["runs"][:5])
            verdict.demand(not rule["broken"], f"reconcile: {rule['name']}: {rule['broken']} runs: {named}")
        await compare(self.engine, self.published, self.heard, verdict)
        queues = await asyncio.to_thread(self._queues)
        verdict.counts["parked"] = queues[PARKED_QUEUE]
        verdict.demand(not queues[PARKED_QUEUE], f"{queues[PARKED_QUEUE]} messages were parked")
        left = {queue: count for queue, count in queues.items() if count and queue not in {PARKED_QUEUE, EVENTS_QUEUE}}
        verdict.demand(not left, f"messages are left in {left}")
        judge_memory(self.fleet.memory, verdict)
        verdict.counts["seconds in all"] = round(lasted)
        verdict.counts["worker processes started"] = self.fleet.starts
        verdict.counts |= {f"fault: {fault}": count for fault, count in sorted(self.storm.done.items())}
        verdict.counts |= {f"logged as error: {words}": n for words, n in self.fleet.complaints().most_common(10)}
        verdict.violations += self.fleet.faults
        verdict.violations += [f"the soak itself failed: {trouble}" for trouble in self.storm.troubles]


def main() -> int:
    """Parse the command line and soak."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults and traffic last (default: 10)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="have the same faults again")
    parser.add_argument(
        "--workers", type=int, default=3, help="worker processes; number 0 is never killed (default: 3)"
    )
    parser.add_argument("--rate", type=float, default=200.0, help="runs published a second (default: 200)")
    parser.add_argument("--rabbitmq", choices=("3.10", "4"), default="4", help="which RabbitMQ (default: 4)")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON on standard output")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the workers' logs here")
    options = parser.parse_args()
    if options.workers < 1 or options.minutes <= 0 or options.rate <= 0:
        parser.error("--workers, --minutes and --rate must be positive")
    faults = schedule(seconds=options.minutes * 60, seed=options.seed, workers=options.workers)
    again = f"scripts/soak --minutes {options.minutes:g} --seed {options.seed} --workers {options.workers}"
    console.print(f"{again} --rate {options.rate:g} --rabbitmq {options.rabbitmq}\n{len(faults)} faults:")
    console.print("\n".join(map(str, faults)), markup=False)
    end_on_signals()
    # Every kill would fill a screen with what the clients of this process think of it.
    for name in ("aiormq", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="closeout-soak-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may have to run as another user
            with running_pair(folder / "servers", options.rabbitmq, management=False) as (
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
                        for log in soak.fleet.logs.iterdir():
                            (options.logs / log.name).write_bytes(log.read_bytes())
    except ServerError as error:
        console.print(f"soak: {error}", style="red", markup=False)
        return 1
    verdict.print(Console(highlight=False, soft_wrap=True), as_json=options.json)
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
