"""A private Citus cluster: a coordinator and worker nodes.

Its PostgreSQL is not among the development requirements: $CITUS_PG_BIN names the folder of its programs.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from servers.postgres import PostgresServer
from servers.process import ServerError
from servers.server import READY_SECONDS, start_all

PROGRAMS = "CITUS_PG_BIN"
HOST = "127.0.0.1"
WORKERS = 2
# Shards of a table: enough that each node has some of every table, and few enough that a database is made in seconds.
SHARDS = 8
_PRELOADED = "shared_preload_libraries"
SETTINGS = {
    _PRELOADED: "citus",
    "citus.node_conninfo": "sslmode=prefer",
    "citus.enable_statistics_collection": "off",
    "citus.shard_count": str(SHARDS),
    "output_plugin_libraries": "pgoutput,citus",
    "wal_level": "logical",  # shards are moved while they are written
    "max_prepared_transactions": "200",  # a transaction on several nodes is prepared on each
    "max_connections": "300",  # the coordinator's sessions open sessions on every node
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    # Prepared transactions of a node that crashed are recovered within this time.
    "citus.recover_2pc_interval": "2s",
    "citus.node_connection_timeout": "5s",
    "citus.enable_unsafe_triggers": "on",  # tests make writes fail with triggers
}
# Seconds until a new node has the metadata.
SYNCED_SECONDS = 30.0


def find_citus() -> Path | None:
    """Return the folder that $CITUS_PG_BIN names, or ``None`` if it is not set."""
    named = os.environ.get(PROGRAMS)
    return Path(named) if named else None


def merged(settings: Mapping[str, str]) -> dict[str, str]:
    """Return :data:`SETTINGS` with *settings*; Citus must be the first of the preloaded libraries."""
    preloaded = [SETTINGS[_PRELOADED], *([settings[_PRELOADED]] if _PRELOADED in settings else [])]
    return {**SETTINGS, **settings, _PRELOADED: ",".join(preloaded)}


class CitusNode(PostgresServer):
    """One PostgreSQL server of a cluster."""

    def __init__(self, folder: Path, name: str, *, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(folder / name, settings=merged(settings))

    def _programs(self) -> Path:
        programs = find_citus()
        if programs is None:
            raise ServerError(f"set {PROGRAMS} to the folder of the programs of a PostgreSQL with Citus")
        return programs


class Coordinator:
    """A cluster's coordinator alone."""

    def __init__(self, cluster: "CitusServer") -> None:
        self._cluster = cluster

    def kill(self) -> None:
        """Kill it."""
        CitusNode.kill(self._cluster)

    def start(self) -> None:
        """Start it."""
        CitusNode.start(self._cluster)

    def suspend(self) -> None:
        """Suspend it."""
        CitusNode.suspend(self._cluster)

    def resume(self) -> None:
        """Resume it."""
        CitusNode.resume(self._cluster)


class CitusServer(CitusNode):
    """A coordinator with its worker nodes. All have the metadata, so that each accepts queries.

    Starting, stopping and killing it affects all nodes.
    """

    def __init__(
        self, folder: Path, *, workers: int = WORKERS, settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(folder, "coordinator", settings=settings)
        self.workers = [CitusNode(folder, f"worker{number}", settings=settings) for number in range(1, workers + 1)]

    @property
    def nodes(self) -> "list[Coordinator | CitusNode]":
        """The servers one by one, the coordinator first."""
        return [Coordinator(self), *self.workers]

    def start(self, *, seconds: float = READY_SECONDS) -> Self:
        """Start all nodes."""
        start_all(*self.workers)
        return super().start(seconds=seconds)

    def stop(self) -> None:
        """Stop all nodes."""
        super().stop()
        for node in self.workers:
            node.stop()

    def kill(self) -> None:
        """Kill all nodes."""
        super().kill()
        for node in self.workers:
            node.kill()

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create database *name* on every node, join them, and return its URL on the coordinator."""
        if template is not None:
            raise ServerError("a database of a cluster cannot be copied")
        super().create_database(name)
        self.psql("CREATE EXTENSION citus", name)
        self.psql(f"SELECT citus_set_coordinator_host('{HOST}', {self.port})", name)
        for node in self.workers:
            self.join(node, name)
        return self.url(name)

    def join(self, node: CitusNode, database: str) -> None:
        """Create *database* on the running *node*, and add it to the cluster; it has no shards yet."""
        node.create_database(database)
        node.psql("CREATE EXTENSION citus", database)
        self.psql(f"SELECT citus_add_node('{HOST}', {node.port})", database)
        deadline = time.monotonic() + SYNCED_SECONDS
        synced = f"SELECT metadatasynced FROM pg_dist_node WHERE nodeport = {node.port}"  # noqa: S608 - a number
        while self.psql(synced, database) != "t":
            if time.monotonic() > deadline:
                raise ServerError(f"{node.name} has no metadata; the end of {node.log}:\n{node.log_tail()}")
            time.sleep(0.05)

    def drop_database(self, name: str) -> None:
        """Drop database *name* on every node."""
        super().drop_database(name)
        for node in self.workers:
            node.drop_database(name)
