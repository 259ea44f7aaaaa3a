"""The private servers that all subjects share, emptied between rounds, and what can be read off them."""

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

# One subscriber to all events, durable like a good subscriber's: every event must be written somewhere.
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
# Statements are counted and commits are dated, for which all subjects pay alike.
SETTINGS = {
    "shared_preload_libraries": "pg_stat_statements",
    "track_commit_timestamp": "on",
    "max_wal_size": "4GB",
    # A sixth of the machine's memory. With the default of 128 MB the indexes of a million runs do not fit, and each
    # random key of a run costs a page read and another written: half a millisecond of PostgreSQL's CPU a run.
    "shared_buffers": "4GB",
}
QUORUM: dict[str, FieldValue] = {"x-queue-type": "quorum"}


class Reading(NamedTuple):
    """What had been used by one moment; the difference of two is a cost."""

    at: float
    runs: int
    statements: int
    transactions: int
    wal_bytes: int
    cpu: dict[str, float]  # seconds, by who used them


@dataclass(slots=True)
class Arena:
    """Both servers, up."""

    postgres: PostgresServer
    rabbit: RabbitServer
    environment: dict[str, str]
    since: str = "-infinity"  # what was received before it is not this round's

    def sql(self, query: str) -> list[str]:
        """Run *query* in the benchmark's database; return the rows, values parted by tabs."""
        database = self.environment["DATABASE_URL"].rpartition("/")[2]
        return self.postgres.psql(query, database).splitlines()

    async def declare(self) -> None:
        """Declare the subscriber's queue."""
        broker = BrokerConnection(self.environment["AMQP_URL"], name="bench")
        channel = await broker.channel(confirms=False)
        await channel.queue_declare(EVENTS_QUEUE, durable=True, arguments=QUORUM)
        await channel.queue_bind(EVENTS_QUEUE, EVENTS_EXCHANGE, routing_key="#")
        await channel.queue_declare(CELERY_QUEUE, durable=True, arguments=QUORUM)
        await broker.close()

    def empty(self, *, keep: bool = False) -> None:
        """Forget all runs and messages, and get what is dirty onto the disk, so that no round pays for another's.

        *keep*: the runs stay, and no longer count.
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

    def told(self) -> int:
        """Return how many runs have all their events confirmed."""
        return int(self.sql(f"SELECT count(events_published_at) FROM {self._this_round()}")[0])

    def _this_round(self) -> str:
        return f"governance.run_completions WHERE received_at >= '{self.since}'"

    def rate(self, skip: int) -> float:
        """Return runs a second by the moments at which their events were confirmed, without the first *skip* runs."""
        found = self.sql(
            "SELECT (max(n) - min(n)) / extract(epoch FROM max(at) - min(at)) FROM (SELECT events_published_at AS at, "
            "rank() OVER (ORDER BY events_published_at) AS n FROM "
            f"{self._this_round()}) AS told WHERE n > {skip} AND at IS NOT NULL"
        )
        return float(found[0])

    def reading(self, workers: Sequence[int]) -> Reading:
        """Read off what was used until now; *workers* are the process ids of the Python side."""
        row = self.sql(
            f"SELECT (SELECT count(events_published_at) FROM {self._this_round()}), "
            "(SELECT coalesce(sum(calls), 0) FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid "
            "WHERE datname = current_database()), "
            "(SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()), "
            "pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')"
        )[0].split("\t")
        cpu = {
            "PostgreSQL": cpu_of(_process(self.postgres)),
            "RabbitMQ": cpu_of(_process(self.rabbit)),
            "worker": sum(cpu_of(psutil.Process(pid)) for pid in workers),
        }
        return Reading(time.monotonic(), int(row[0]), int(row[1]), int(row[2]), int(row[3]), cpu)


def cpu_of(root: psutil.Process) -> float:
    """Return the seconds of CPU that *root* and all below it have used, the ended ones among them included."""
    seconds = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _process(server: PostgresServer | RabbitServer) -> psutil.Process:
    assert server._process is not None  # noqa: S101, SLF001 - the server is running
    return psutil.Process(server._process.pid)  # noqa: SLF001
