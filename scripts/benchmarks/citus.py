"""One worker on a Citus cluster, and the same worker on a single PostgreSQL of the same machine."""

from collections.abc import Mapping
from pathlib import Path

from demo_run.setup import closeout as run_command
from demo_run.setup import set_up
from servers import PostgresServer
from servers.clusters.citus import CitusServer

from benchmarks.arena import SETTINGS, Arena, cpu_of, process_of
from benchmarks.race import Lap, lap
from benchmarks.subjects import closeout

PLAIN, CLUSTER = "one PostgreSQL", "Citus, {nodes} nodes"
RUNS = 6_000
_STATEMENTS = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query {condition}"
_PREPARED = "ILIKE 'PREPARE TRANSACTION%'"


def race(plain: Arena, folder: Path, rounds: int) -> dict[str, list[Lap]]:
    """Alternate *rounds* laps on each; both have the same broker, and the cluster's nodes share this machine.

    Beside the usual costs per run: the statements that nodes received, and the transactions that they prepared, that
    is, which were committed in two phases.
    """
    # A quarter of the buffers for each node: they share a machine.
    cluster = CitusServer(folder / "citus", settings={**SETTINGS, "shared_buffers": "1GB"})
    try:
        cluster.start()
        places = {PLAIN: plain, CLUSTER.format(nodes=len(cluster.workers)): _arena(plain, cluster)}
        laps: dict[str, list[Lap]] = {name: [] for name in places}
        for number in range(rounds):
            for name in list(places) if number % 2 == 0 else list(places)[::-1]:
                laps[name].append(_lap(places[name], name, number + 1, folder))
    finally:
        cluster.kill()
    return laps


def _arena(plain: Arena, cluster: CitusServer) -> Arena:
    environment: Mapping[str, str] = {**plain.environment, "DATABASE_URL": cluster.create_database("closeout")}
    set_up(environment)
    run_command(environment, "distribute")
    cluster.psql("CREATE EXTENSION pg_stat_statements", "closeout")  # Citus creates it on the other nodes
    return Arena(cluster, plain.rabbit, dict(environment), others=tuple(cluster.workers))


def _lap(place: Arena, name: str, seed: int, logs: Path) -> Lap:
    for server in place.others:
        server.psql("SELECT pg_stat_statements_reset()", "closeout")
    before = sum(cpu_of(process_of(server)) for server in place.others)
    found = lap(place, closeout(name, runs=RUNS), seed, logs)
    nodes = {
        "of it nodes": 1000 * (sum(cpu_of(process_of(server)) for server in place.others) - before) / RUNS,
        "statements on nodes": sum(_calls(server, "IS NOT NULL") for server in place.others) / RUNS,
        "prepared on nodes": sum(_calls(server, _PREPARED) for server in place.others) / RUNS,
    }
    return Lap(found.rate, {**found.cost, **nodes})


def _calls(server: PostgresServer, condition: str) -> int:
    return int(server.psql(_STATEMENTS.format(condition=condition), "closeout"))
