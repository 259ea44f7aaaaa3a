"""Injects the scheduled faults into workers and servers."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psycopg
from servers import PostgresServer, RabbitServer, Server, ServerError
from servers.clusters.citus import Coordinator

from soak_run.schedule import Fault
from soak_run.worker_processes import WorkerProcesses

STARTS = 3
BLOCKED, OPEN = "0", "0.4"  # of the memory: RabbitMQ's high watermark


@dataclass(slots=True)
class FaultInjector:
    """Injects faults; faults of one target follow each other."""

    workers: WorkerProcesses
    postgres: PostgresServer
    nodes: "Sequence[PostgresServer | Coordinator]"  # of PostgreSQL, for faults of one
    rabbit: RabbitServer
    log: Callable[[str], None]
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def run(self, faults: Sequence[Fault], started: float) -> None:
        """Inject *faults* at their times since *started*; return when all targets run again."""
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, started + fault.at - time.monotonic()))
                self.log(str(fault))
                group.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        target = fault.target if fault.target != "worker" else f"worker {fault.number}"
        async with self._locks.setdefault(target, asyncio.Lock()):
            try:
                await (
                    self._inject_worker_fault(fault) if fault.target == "worker" else self._inject_server_fault(fault)
                )
            except (ServerError, psycopg.Error, OSError, AssertionError) as error:
                self.failures.append(f"{fault}: {str(error)[:300]}")
            else:
                self.done[f"{fault.kind} {fault.target}"] += 1

    async def _inject_worker_fault(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                await self.workers.kill(fault.number)
            case "term":
                await self.workers.term(fault.number)
            case _:
                await self.workers.suspend(fault.number, fault.seconds)

    async def _inject_server_fault(self, fault: Fault) -> None:
        server: Server | Coordinator = self.rabbit
        if fault.target == "postgresql":
            server = self.nodes[fault.number % len(self.nodes)]
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

    async def _start(self, server: "Server | Coordinator") -> None:
        for attempt in range(STARTS):
            try:
                await asyncio.to_thread(server.start)
            except ServerError:
                if attempt == STARTS - 1:
                    raise
                await asyncio.sleep(1)
            else:
                return
