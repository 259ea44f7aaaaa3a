"""The cost of PgBouncer in transaction mode: the same worker with a direct connection and through PgBouncer."""

from configparser import ConfigParser
from pathlib import Path

from servers import PgBouncerServer

from benchmarks.arena import Arena
from benchmarks.race import Lap, lap
from benchmarks.subjects import closeout

DEPLOY = Path(__file__).parents[2] / "deploy" / "pgbouncer"
DIRECT, THROUGH = "direct", "through PgBouncer"
# Settings of one installation; the private server has its own.
_LOCAL = ("listen_addr", "listen_port", "auth_type", "auth_file")
_ROLE = "pooled"


def race(arena: Arena, folder: Path, rounds: int) -> dict[str, list[Lap]]:
    """Alternate *rounds* laps each way; PgBouncer has the settings of deploy/pgbouncer."""
    shipped = ConfigParser()
    shipped.read(DEPLOY / "pgbouncer.ini")
    settings = {name: value for name, value in shipped["pgbouncer"].items() if name not in _LOCAL}
    database = arena.environment["DATABASE_URL"].rpartition("/")[2]
    arena.sql(f"CREATE ROLE {_ROLE} LOGIN SUPERUSER; SET ROLE {_ROLE}; {(DEPLOY / 'worker-role.sql').read_text()}")
    laps: dict[str, list[Lap]] = {DIRECT: [], THROUGH: []}
    server = PgBouncerServer(folder, postgres_port=arena.postgres.port, users=[_ROLE], settings=settings)
    server.start()
    try:
        ways = [closeout(DIRECT), closeout(THROUGH, DATABASE_URL=server.url(database, user=_ROLE))]
        for number in range(rounds):
            for way in ways if number % 2 == 0 else ways[::-1]:
                laps[way.name].append(lap(arena, way, number + 1, folder))
    finally:
        server.stop()
    return laps
