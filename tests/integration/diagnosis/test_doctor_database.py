"""``closeout doctor`` on the database: every check, on a real server in the matching state."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from servers import PostgresServer
from servers.clusters.postgres_standby import PostgresStandby
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.outcome import TransactionFailed
from consumer.closeout.rollbacks import record_rollbacks
from consumer.diagnosis.check import Check
from consumer.diagnosis.database import examine_database, version_check
from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from consumer.phases import TransactionPhase
from consumer.postgres.engine import DATABASE_ERRORS, create_engine
from consumer.postgres.privileges import WORKER_PRIVILEGES, each_privilege
from domains.migrations.upgrade import newest
from domains.policies.book import PolicyBook
from domains.run import RunKey
from tests.support import run_messages as runs
from tests.support.command_line import closeout
from tests.support.traffic import listen
from tests.support.waiting import until

ALL = [
    "postgresql",
    "writable",
    "role",
    "clock",
    "connections",
    "durability",
    "schema",
    "rights",
    "outbox",
    "unfinished",
]


async def examined(url: str, *, off: timedelta = timedelta(0), needed: int = 5) -> dict[str, Check]:
    engine = create_engine(url, pool_size=1)
    try:
        found = await examine_database(engine, connections_needed=needed, clock=lambda: datetime.now(UTC) + off)
    finally:
        await engine.dispose()
    assert all(check.remedy for check in found if check.state != "ok")
    return {check.name: check for check in found}


def troubled(checks: dict[str, Check]) -> dict[str, str]:
    return {name: str(check.state) for name, check in checks.items() if check.state != "ok"}


@asynccontextmanager
async def _changed(engine: AsyncEngine, *statements: str) -> AsyncIterator[None]:
    async with engine.begin() as conn:
        for statement in statements:
            await conn.execute(text(statement))
    yield


@pytest.fixture
def role(database_url: str, postgres: PostgresServer) -> Iterator[str]:
    """A role with exactly the privileges that the doctor checks; its name is the database's with a prefix."""
    name = database_url.rsplit("/", 1)[1]
    made = f"doctor_{name}"
    postgres.psql(f"CREATE ROLE {made} LOGIN; GRANT USAGE ON SCHEMA governance TO {made}", name)
    postgres.psql(f"GRANT SELECT ON governance.schema_version TO {made}", name)
    for table, rights in WORKER_PRIVILEGES.items():
        postgres.psql(f"GRANT {', '.join(rights.split())} ON governance.{table} TO {made}", name)
    yield made
    postgres.psql(f"DROP OWNED BY {made}; DROP ROLE {made}", name)


@pytest.fixture
def worker_url(database_url: str, postgres: PostgresServer, role: str) -> str:
    return postgres.url(database_url.rsplit("/", 1)[1], user=role)


async def test_a_migrated_database_and_a_workers_role_pass_every_check(worker_url, role):
    checks = await examined(worker_url)

    assert troubled(checks) == {}
    assert list(checks) == ALL
    assert checks["postgresql"].found.startswith("reachable, version ")
    assert checks["role"].found == f"{role}, not a superuser"
    assert newest() in checks["schema"].found


async def test_an_unavailable_database_is_the_only_problem_reported(database_url):
    checks = await examined("postgresql://nobody@127.0.0.1:1/nothing")

    assert list(checks) == ["postgresql"]
    assert checks["postgresql"].state == "problem"
    assert "not reachable" in checks["postgresql"].found


@pytest.mark.parametrize(("number", "state"), [(140_012, "problem"), (150_000, "ok"), (180_003, "ok")])
def test_a_server_older_than_the_schema_needs_is_a_problem(number, state):
    """The private servers have one version; only the rule is tested."""
    assert version_check(number, "x").state == state


async def test_a_read_only_database_is_a_problem(engine, database_url):
    name = database_url.rsplit("/", 1)[1]
    async with _changed(engine, f"ALTER DATABASE {name} SET default_transaction_read_only = on"):
        checks = await examined(database_url)

    assert checks["writable"].state == "problem"
    assert "default_transaction_read_only" in checks["writable"].found


async def test_a_standby_is_a_problem(postgres: PostgresServer, database_url: str, tmp_path: Path):
    standby = PostgresStandby(tmp_path / "standby", postgres)
    with standby:
        checks = await examined(standby.url(database_url.rsplit("/", 1)[1]))

    assert checks["writable"].state == "problem"
    assert "standby" in checks["writable"].found
    assert "target_session_attrs=read-write" in checks["writable"].remedy


async def test_a_superuser_is_a_warning(database_url):
    assert troubled(await examined(database_url)) == {"role": "warning"}


@pytest.mark.parametrize(("minutes", "state"), [(0.1, "warning"), (-0.1, "warning"), (5, "problem"), (-5, "problem")])
async def test_clock_skew_is_reported_and_a_minute_of_it_is_a_problem(worker_url, minutes, state):
    checks = await examined(worker_url, off=timedelta(minutes=minutes))

    assert troubled(checks) == {"clock": state}
    assert abs(float(checks["clock"].found.split()[0]) - abs(minutes) * 60) < 1


@pytest.mark.parametrize("of", ["ROLE {role}", "DATABASE {database}"])
async def test_too_few_connections_for_another_worker_are_a_warning(engine, worker_url, database_url, role, of):
    name = of.format(role=role, database=database_url.rsplit("/", 1)[1])
    async with _changed(engine, f"ALTER {name} CONNECTION LIMIT 4"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"connections": "warning"}
    assert " of 4 left" in checks["connections"].found
    assert "a worker takes up to 5" in checks["connections"].found


async def test_connections_reserved_for_superusers_do_not_count_as_free(worker_url):
    few, many = await examined(worker_url, needed=5), await examined(worker_url, needed=198)

    assert "of 197 left (max_connections)" in few["connections"].found
    assert troubled(many) == {"connections": "warning"}


async def test_an_exhausted_connection_limit_is_reported_with_the_servers_message(engine, worker_url, role):
    async with _changed(engine, f"ALTER ROLE {role} CONNECTION LIMIT 0"):
        checks = await examined(worker_url)

    assert 'not reachable: too many connections for role "' in checks["postgresql"].found


async def test_a_database_that_was_never_migrated_is_a_problem(empty_database_url):
    checks = await examined(empty_database_url)

    assert checks["schema"].state == "problem"
    assert checks["schema"].remedy == "run closeout migrate"
    assert "rights" not in checks


@pytest.mark.parametrize("command", [["runs", "list"], ["prune", "--older-than", "90d"]])
async def test_a_command_on_an_unmigrated_database_names_the_migrate_command(empty_database_url, command):
    done = await closeout(*command, DATABASE_URL=empty_database_url)

    assert done.returncode == 1
    assert "the schema does not exist or is older than this version: run closeout migrate" in done.stderr


async def test_a_schema_of_a_newer_closeout_is_a_warning(engine, worker_url):
    async with _changed(engine, "UPDATE governance.schema_version SET version_num = '9999'"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"schema": "warning"}
    assert checks["schema"].remedy == "upgrade closeout"


async def test_a_schema_behind_this_version_is_a_problem(engine, worker_url, monkeypatch):
    """Raises the package's newest version instead of lowering the database's."""
    monkeypatch.setattr("consumer.diagnosis.database.newest", lambda: "9999")

    checks = await examined(worker_url)

    assert troubled(checks) == {"schema": "problem"}
    assert checks["schema"].found == f"at {newest()}; this version of closeout requires 9999"


async def test_a_table_that_differs_from_the_migrations_is_a_problem(engine, worker_url):
    async with _changed(engine, "ALTER TABLE governance.incidents DROP COLUMN title"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"schema": "problem"}
    assert "title" in checks["schema"].found
    assert "closeout migrate --check" in checks["schema"].remedy


async def test_a_schema_without_usage_for_the_role_is_a_problem(engine, worker_url, role):
    async with _changed(engine, f"REVOKE USAGE ON SCHEMA governance FROM {role}"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"schema": "problem"}
    assert "USAGE" in checks["schema"].remedy


async def test_a_schema_version_unreadable_for_the_role_is_a_warning(engine, worker_url, role):
    async with _changed(engine, f"REVOKE ALL ON governance.schema_version FROM {role}"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"schema": "warning"}
    assert "permission denied" in checks["schema"].found


@pytest.mark.parametrize("table", WORKER_PRIVILEGES)
async def test_every_missing_privilege_is_named(engine, worker_url, role, table):
    async with _changed(engine, f"REVOKE ALL ON governance.{table} FROM {role}"):
        checks = await examined(worker_url)

    assert checks["rights"].state == "problem"
    of_table = [str(right) for right in sorted(each_privilege()) if right.table == table]
    assert checks["rights"].found == f"missing privileges: {', '.join(of_table)} on {table}"


async def test_a_worker_needs_exactly_the_privileges_that_are_checked(engine, worker_url, role, broker):
    await listen(broker)
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.policies VALUES (gen_random_uuid(), NULL, 'quiet', 1, 'suppress_incident', "
                "'LOW', 'run.error_code == \"MANUAL_STOP\"', true, now())"
            )
        )
    await _work_of_a_worker(engine, worker_url, broker)
    for right in each_privilege():
        if right.column == "created_at":
            continue  # workers of earlier versions check it; FOR UPDATE is content with any column
        async with _changed(engine, f"REVOKE {right} ON governance.{right.table} FROM {role}"):
            refused = f"permission denied for table {right.table}"
            with pytest.raises((TransactionFailed, *DATABASE_ERRORS), match=refused):
                await _work_of_a_worker(engine, worker_url, broker)
        async with _changed(engine, f"GRANT {right} ON governance.{right.table} TO {role}"):
            pass


async def test_asynchronous_commits_are_a_warning_and_a_worker_waits_for_the_disk_all_the_same(
    engine, worker_url, role
):
    async with _changed(engine, f"ALTER ROLE {role} SET synchronous_commit = off"):
        checks = await examined(worker_url)
        theirs = create_engine(worker_url, pool_size=1, by_key=True)
        async with theirs.connect() as conn:
            used = (await conn.execute(text("SHOW synchronous_commit"))).scalar_one()
        await theirs.dispose()
    async with _changed(engine, f"ALTER ROLE {role} SET synchronous_commit = remote_apply"):
        theirs = create_engine(worker_url, pool_size=1, by_key=True)
        async with theirs.connect() as conn:
            kept = (await conn.execute(text("SHOW synchronous_commit"))).scalar_one()
        await theirs.dispose()
        assert troubled(await examined(worker_url)) == {}
    async with _changed(engine, f"ALTER ROLE {role} RESET synchronous_commit"):
        assert troubled(await examined(worker_url)) == {}

    assert troubled(checks) == {"durability": "warning"}
    assert "workers raise it to local" in checks["durability"].found
    assert (used, kept) == ("local", "remote_apply")


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_a_server_that_does_not_write_through_is_a_problem(engine, worker_url, postgres, setting):
    async def judged(state: str) -> bool:
        return (await examined(worker_url))["durability"].state == state

    async def set_to(value: str) -> None:
        await asyncio.to_thread(postgres.psql, f"ALTER SYSTEM SET {setting} = {value}")
        await asyncio.to_thread(postgres.psql, "SELECT pg_reload_conf()")

    await set_to("off")
    try:
        await until(lambda: judged("problem"), what=f"a problem with {setting} off")
        assert f"{setting} off" in (await examined(worker_url))["durability"].found
    finally:
        await set_to("on")
    await until(lambda: judged("ok"), what=f"no problem with {setting} on")


@pytest.mark.parametrize(("age", "state"), [("1 s", None), ("20 s", "warning"), ("2 min", "problem")])
async def test_unpublished_events_are_judged_by_their_age(engine, worker_url, age, state):
    await create_transaction_coordinator(engine=engine).execute(runs.run())
    change = f"UPDATE governance.outbox_events SET created_at = now() - interval '{age}'"
    async with _changed(engine, change):
        checks = await examined(worker_url)

    assert troubled(checks) == ({"outbox": state} if state else {})
    assert checks["outbox"].found.startswith("1 run has unpublished events")


async def test_an_old_unfinished_legacy_close_out_is_a_problem(engine, worker_url):
    await create_transaction_coordinator(engine=engine).execute(runs.run())
    unfinished = (
        "UPDATE governance.run_completions SET mode = 'legacy', committed_at = NULL, phase = 'INCIDENT_CREATED'"
    )
    async with _changed(engine, "DELETE FROM governance.outbox_events", f"{unfinished}, received_at = now()"):
        assert troubled(await examined(worker_url)) == {}
    async with _changed(engine, f"{unfinished}, received_at = now() - interval '6 min'"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"unfinished": "problem"}
    assert checks["unfinished"].found.startswith("1 legacy close-out is unfinished, the first since 20")


async def test_unreadable_tables_do_not_stop_the_other_checks(engine, worker_url, role):
    async with _changed(engine, f"REVOKE ALL ON governance.outbox_events, governance.run_completions FROM {role}"):
        checks = await examined(worker_url)

    assert troubled(checks) == {"rights": "problem", "outbox": "problem", "unfinished": "problem"}
    assert "permission denied" in checks["unfinished"].found


async def _work_of_a_worker(engine: AsyncEngine, url: str, broker: BrokerConnection) -> None:
    """Execute every statement of a worker on both paths; raises the first refusal."""
    theirs = create_engine(url, pool_size=3, by_key=True)
    metrics = Metrics()
    try:
        started = runs.run()
        async with engine.begin() as conn:
            await conn.execute(
                text(
                    "INSERT INTO governance.traces (tenant_id, trace_id, run_id, status, started_at) "
                    "VALUES ('acme', :trace, :run, 'running', now())"
                ),
                {"trace": started.trace_id, "run": started.run_id},
            )
        made = [started, runs.run(error_code="MANUAL_STOP")]
        coordinator = create_transaction_coordinator(engine=theirs)
        await coordinator.execute_many(made)
        await coordinator.execute_many(made)
        legacy = LegacyCloseOut(engine=theirs, policies=PolicyBook())
        for run in (runs.run(), runs.run(error_code="MANUAL_STOP")):
            await legacy.execute(Arrival.of(run))
            await legacy.execute(Arrival.of(run))
        key = RunKey("acme", started.run_id)
        phase = TransactionPhase.NOT_STARTED
        await record_rollbacks(theirs, [key], phase=phase, operations=[], error=ValueError("x"))
        await coordinator.execute(unpublished := runs.run())
        async with theirs.begin() as conn:
            await outbox.set_aside(conn, {RunKey("acme", unpublished.run_id): "refused"})
        publisher = EventPublisher(ConfirmedChannel(broker), metrics=metrics)
        await Relay(engine=theirs, publisher=publisher, metrics=metrics, grace_seconds=0).sweep()
    finally:
        await theirs.dispose()
