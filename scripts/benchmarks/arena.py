"""The private servers that all subjects share: they are emptied between rounds, and their resource use is read."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
from pamqp.common import FieldValue
from servers import PostgresServer, RabbitServer

from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import EVENTS_EXCHANGE

# A durable subscription to all events, so that the broker stores every event.
EVENTS_QUEUE = "bench.events"
CELERY_QUEUE = "bench.celery"
TABLES = (
    "run_completions",
    "incidents",
    "prevention_records",
    "policy_evaluations",
    "traces",
    "outbox_events",
    "rollbacks",
)
# Counting statements and dating commits cost all subjects the same.
SETTINGS = {
    "shared_preload_libraries": "pg_stat_statements",
    "track_commit_timestamp": "on",
    "max_wal_size": "4GB",
    # With the default of 128 MB the indexes of a million runs do not fit: each run costs page reads and writes, half a
    # millisecond of PostgreSQL's CPU.
    "shared_buffers": "4GB",
}
QUORUM: dict[str, FieldValue] = {"x-queue-type": "quorum"}


class Reading(NamedTuple):
    """Resources used so far; the difference of two readings is a cost."""

    at: float
    runs: int
    statements: int
    transactions: int
    wal_bytes: int
    cpu: dict[str, float]  # seconds, by process


@dataclass(slots=True)
class Arena:
    """Both servers, running."""

    postgres: PostgresServer
    rabbit: RabbitServer
    environment: dict[str, str]
    since: str = "-infinity"  # runs received before belong to earlier rounds
    others: tuple[PostgresServer, ...] = ()  # a cluster's other nodes, whose WAL and CPU count too

    def sql(self, query: str) -> list[str]:
        """Run *query* in the benchmark's database; return the rows, with values separated by tabs."""
        database = self.environment["DATABASE_URL"].rpartition("/")[2]
        return self.postgres.psql(query, database).splitlines()

    async def declare(self) -> None:
        """Declare the queues of the subscriber and of Celery."""
        broker = BrokerConnection(self.environment["AMQP_URL"], name="bench")
        channel = await broker.channel(confirms=False)
        await channel.queue_declare(EVENTS_QUEUE, durable=True, arguments=QUORUM)
        await channel.queue_bind(EVENTS_QUEUE, EVENTS_EXCHANGE, routing_key="#")
        await channel.queue_declare(CELERY_QUEUE, durable=True, arguments=QUORUM)
        await broker.close()

    def empty(self, *, keep: bool = False) -> None:
        """Delete all runs and messages and write dirty pages to disk, so that rounds are independent.

        With *keep* the runs stay but are no longer counted.
        """
        if not keep:
            self.sql(f"TRUNCATE {', '.join('governance.' + table for table in TABLES)}")
        self.sql("CHECKPOINT")
        self.since = self.sql("SELECT clock_timestamp()")[0]
        asyncio.run(self._purge())

    async def _purge(self) -> None:
        broker = BrokerConnection(self.environment["AMQP_URL"], name="bench")
        channel = await broker.channel(confirms=False)
        for queue in ("closeout.run-completed", "closeout.parked", EVENTS_QUEUE, CELERY_QUEUE):
            await channel.queue_purge(queue)
        await broker.close()

    def finished_runs(self) -> int:
        """Return the number of this round's runs with all events confirmed."""
        return int(self.sql(f"SELECT count(events_published_at) FROM {self._this_round()}")[0])

    def _this_round(self) -> str:
        return f"governance.run_completions WHERE received_at >= '{self.since}'"

    def rate(self, skip: int) -> float:
        """Return runs per second by the times of their events' confirms, without the first *skip* runs."""
        found = self.sql(
            "SELECT (max(n) - min(n)) / extract(epoch FROM max(at) - min(at)) FROM (SELECT events_published_at AS at, "
            "rank() OVER (ORDER BY events_published_at) AS n FROM "
            f"{self._this_round()}) AS finished WHERE n > {skip} AND at IS NOT NULL"
        )
        return float(found[0])

    def reading(self, workers: Sequence[int]) -> Reading:
        """Return the resources used so far; *workers* are the process ids of the subject."""
        row = self.sql(
            f"SELECT (SELECT count(events_published_at) FROM {self._this_round()}), "
            "(SELECT coalesce(sum(calls), 0) FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid "
            "WHERE datname = current_database()), "
            "(SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())"
        )[0].split("\t")
        servers = (self.postgres, *self.others)
        wal = sum(int(server.psql("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")) for server in servers)
        cpu = {
            "PostgreSQL": sum(cpu_of(process_of(server)) for server in servers),
            "RabbitMQ": cpu_of(process_of(self.rabbit)),
            "worker": sum(cpu_of(psutil.Process(pid)) for pid in workers),
        }
        return Reading(time.monotonic(), int(row[0]), int(row[1]), int(row[2]), wal, cpu)


def cpu_of(root: psutil.Process) -> float:
    """Return the CPU seconds of *root* and its descendants, exited ones included."""
    seconds = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def process_of(server: PostgresServer | RabbitServer) -> psutil.Process:
    """Return the main process of the running *server*."""
    assert server._process is not None  # noqa: S101, SLF001 - the server is running
    return psutil.Process(server._process.pid)  # noqa: SLF001
