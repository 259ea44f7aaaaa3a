"""Doing to workers and servers what the schedule says."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psycopg
from servers import PostgresServer, RabbitServer, Server, ServerError

from soak_run.schedule import Fault
from soak_run.worker_processes import Fleet

STARTS = 3
BLOCKED, OPEN = "0", "0.4"  # of the memory: RabbitMQ's high watermark


@dataclass(slots=True)
class Storm:
    """Faults on their way; those of one server wait for each other."""

    fleet: Fleet
    postgres: PostgresServer
    rabbit: RabbitServer
    say: Callable[[str], None]
    done: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    _turns: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def blow(self, faults: Sequence[Fault], started: float) -> None:
        """Do *faults* at their times since *started*; return when the last one is over and all is up."""
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, started + fault.at - time.monotonic()))
                self.say(str(fault))
                group.create_task(self._do(fault))

    async def _do(self, fault: Fault) -> None:
        place = fault.target if fault.target != "worker" else f"worker {fault.worker}"
        async with self._turns.setdefault(place, asyncio.Lock()):
            try:
                await (self._hurt_worker(fault) if fault.target == "worker" else self._hurt_server(fault))
            except (ServerError, psycopg.Error, OSError, AssertionError) as error:
                self.troubles.append(f"{fault}: {str(error)[:300]}")
            else:
                self.done[f"{fault.kind} {fault.target}"] += 1

    async def _hurt_worker(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                await self.fleet.kill(fault.worker)
            case "term":
                await self.fleet.term(fault.worker)
            case _:
                await self.fleet.suspend(fault.worker, fault.seconds)

    async def _hurt_server(self, fault: Fault) -> None:
        server: Server = self.rabbit if fault.target == "rabbitmq" else self.postgres
        match fault.kind:
            case "kill":
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(fault.seconds)
                await self._start(server)
            case "suspend":
                await asyncio.to_thread(server.suspend)
                await asyncio.sleep(fault.seconds)
                server.resume()
            case "alarm":
                await asyncio.to_thread(self.rabbit.ctl, "set_vm_memory_high_watermark", BLOCKED)
                await asyncio.sleep(fault.seconds)
                await asyncio.to_thread(self.rabbit.ctl, "set_vm_memory_high_watermark", OPEN)
            case _:
                sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'closeout'"
                await asyncio.to_thread(self.postgres.psql, sql)

    async def _start(self, server: Server) -> None:
        for attempt in range(STARTS):
            try:
                await asyncio.to_thread(server.start)
            except ServerError:
                if attempt == STARTS - 1:
                    raise
                await asyncio.sleep(1)
            else:
                return
