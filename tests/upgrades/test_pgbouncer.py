"""Workers behind a real PgBouncer in transaction mode, with the shipped configuration."""

import re
from collections.abc import AsyncIterator
from configparser import ConfigParser
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from servers import PgBouncerServer
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.console.queries import _SERVER_SETTINGS as CONSOLE_SETTINGS
from consumer.diagnosis.check import Check, ok
from consumer.diagnosis.database import examine_database
from consumer.postgres.engine import WORKER_SETTINGS, create_engine
from consumer.postgres.readiness import probe
from domains.database.pooling import STATEMENT_PREFIX
from domains.migrations.upgrade import PooledConnectionError, migrate
from tests.support import run_messages as runs
from tests.support.faults.endurance import endure
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(90)

DEPLOY = Path(__file__).parents[2] / "deploy/pgbouncer"
ROLE_SQL = DEPLOY / "worker-role.sql"
# Settings that depend on the installation; the private server has others.
LOCAL = {"listen_addr", "listen_port", "auth_type", "auth_file"}
FEW: dict[str, Any] = {"PREFETCH_COUNT": "10", "BATCH_MAX_RUNS": "10"}


def shipped() -> dict[str, str]:
    parser = ConfigParser(inline_comment_prefixes=None)
    parser.read(DEPLOY / "pgbouncer.ini")
    return {name: value for name, value in parser["pgbouncer"].items() if name not in LOCAL}


async def pooler(engine: AsyncEngine) -> list[Check]:
    found = await examine_database(engine, connections_needed=6, clock=lambda: datetime.now(UTC))
    return [check for check in found if check.name == "pooler"]


async def sessions(scenario: Scenario) -> int:
    return int(await scenario.sql(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{scenario.role}'"))


@pytest.fixture
async def pooled(scenario: Scenario, folder: Path) -> AsyncIterator[PgBouncerServer]:
    """PgBouncer in front of the scenario's database, behind the worker's proxy."""
    place = folder / f"pgbouncer-{scenario.database}"
    place.mkdir()
    itself = await asyncpg.connect(scenario.environ["DATABASE_URL"])
    await itself.execute(ROLE_SQL.read_text())
    await itself.close()
    server = PgBouncerServer(
        place,
        postgres_port=scenario.postgres.port,
        users=[scenario.role],
        settings=shipped() | {"default_pool_size": "2"},
    )
    await scenario.in_thread(server.start)
    scenario.database_proxy.targets = [server.port]
    try:
        yield server
    finally:
        await scenario.in_thread(server.kill)


async def test_two_workers_behind_pgbouncer_close_out_every_run_once_and_survive_its_restart(
    scenario: Scenario, pooled: PgBouncerServer
):
    other = await scenario.start(**FEW)
    async with scenario.worker(**FEW) as worker:
        await scenario.until(worker.ready, what="the second worker")

        async def names_it() -> bool:
            return "PostgreSQL" in str((await worker.state())["reason"])

        async def kill() -> None:
            await scenario.in_thread(pooled.kill)
            await scenario.until(names_it, what="a pause")

        # tests/faults watches the course of a pause.
        await endure(scenario, worker, kill, partial(scenario.in_thread, pooled.start), pauses=None)
        assert await sessions(scenario) == 2
    assert await other.metric('closeout_deliveries_total{result="committed"}') > 0
    assert await other.stop() == 0


async def test_a_pgbouncer_without_prepared_statements_is_reported_and_no_run_processed(
    scenario: Scenario, pooled: PgBouncerServer
):
    """PgBouncer 1.20 and older, and max_prepared_statements = 0."""
    pooled.settings["max_prepared_statements"] = "0"
    await scenario.in_thread(pooled.restart)
    await scenario.publish(20)
    async with scenario.worker() as worker:

        async def named() -> bool:
            return "mixes prepared statements: use PgBouncer 1.21" in str((await worker.state())["reason"])

        await scenario.until(named, what="a pause with a reason")
        assert await scenario.count("run_completions") == 0
        pooled.settings["max_prepared_statements"] = "200"
        await scenario.in_thread(pooled.restart)
        await scenario.until(worker.ready, what="work")
        assert await assert_invariants(scenario, worker) == 0


async def test_session_mode_works_like_a_direct_connection(scenario: Scenario, pooled: PgBouncerServer):
    pooled.settings |= {"max_prepared_statements": "0", "pool_mode": "session"}
    await scenario.in_thread(pooled.restart)
    engine = create_engine(scenario.environ["DATABASE_URL"], pool_size=2)
    for _ in range(3):
        await probe(engine)
    await engine.dispose()


async def test_doctor_detects_pgbouncer_and_migrate_needs_a_direct_connection(
    scenario: Scenario, pooled: PgBouncerServer
):
    url = scenario.environ["DATABASE_URL"]
    engine = create_engine(url, pool_size=1)
    try:
        await probe(engine)
        with pytest.raises(PooledConnectionError, match="set DATABASE_URL to the server itself"):
            await migrate(engine)
        (found,) = await pooler(engine)
        assert found == ok("pooler", "PgBouncer detected; required session settings are present")

        await scenario.sql(f"ALTER ROLE {scenario.role} RESET lock_timeout")
        await scenario.in_thread(pooled.restart)
        await engine.dispose()
        (found,) = await pooler(engine)
        assert found.found.endswith("this role's sessions lack lock_timeout=5s")
        assert "worker-role.sql" in found.remedy
    finally:
        await engine.dispose()


def test_the_shipped_pgbouncer_configuration_covers_workers_and_consoles():
    ignored = set(shipped()["ignore_startup_parameters"].split(", "))
    assert ignored | {"application_name"} == set(WORKER_SETTINGS) | set(CONSOLE_SETTINGS)
    given = dict(re.findall(r"^ALTER ROLE CURRENT_USER SET (\w+) = '(.*)';$", ROLE_SQL.read_text(), re.MULTILINE))
    assert given | {"application_name": "closeout"} == WORKER_SETTINGS


async def test_prepared_statement_names_are_unique_across_sessions(engine: AsyncEngine):
    """By default the driver numbers its statements, and the numbers restart in each process."""
    await create_transaction_coordinator(engine=engine).execute(runs.run())
    prepared = text("SELECT name FROM pg_prepared_statements")
    async with engine.connect() as one, engine.connect() as other:
        names = [set((await conn.execute(prepared)).scalars()) for conn in (one, other)]
    assert all(names)
    assert all(name.startswith(STATEMENT_PREFIX) for name in names[0] | names[1])
    assert names[0] & names[1] == set()
