"""Closeout on a real Citus cluster: a coordinator and two worker nodes."""

import asyncio
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text

from consumer import create_transaction_coordinator
from consumer.maintenance.reconcile import reconcile
from consumer.postgres.engine import create_engine
from tests.support import run_messages as runs
from tests.support.broken_writes import count
from tests.support.citus_server import CitusForTests
from tests.support.command_line import closeout
from tests.support.roles import OWNER, as_role, migrated_by_the_owner
from tests.support.traffic import eventually, listen, publish, published_runs, received, worker
from tests.support.waiting import until

TENANTS = [f"tenant-{number}" for number in range(7)]


@pytest.mark.parametrize("coordinator", ["true", "false"])
async def test_runs_of_several_tenants_are_closed_out_on_both_paths(
    coordinator, database_url, amqp_url, engine, broker
):
    bodies = [runs.body(tenant_id=tenant) for tenant in TENANTS for _ in range(5)]
    async with worker(database_url, amqp_url, TRANSACTION_COORDINATOR_ENABLED=coordinator):
        await publish(broker, *bodies, *bodies)
        await eventually(engine, published_runs(), len(bodies))
    for table in ("run_completions", "incidents", "policy_evaluations", "traces"):
        assert await count(engine, table) == len(bodies), table
    assert await count(engine, "outbox_events") == 0
    assert [finding.count for finding in await reconcile(engine, older_than_seconds=60)] == [0] * 11


async def test_commands_work_on_a_cluster(database_url, amqp_url, engine, broker):
    run_id = str(runs.run_id_of(first := runs.body(tenant_id=TENANTS[0])))
    async with worker(database_url, amqp_url):
        await publish(broker, first, *[runs.body(tenant_id=tenant) for tenant in TENANTS])
        await eventually(engine, published_runs(), 1 + len(TENANTS))
    for command in (
        ("runs", "list"),
        ("runs", "show", run_id),
        ("runs", "show", f"{TENANTS[0]}/{run_id}"),
        ("outbox", "status"),
        ("outbox", "drain"),
        ("policies", "list"),
        ("policies", "shadow"),
        ("reconcile",),
    ):
        done = await closeout(*command, DATABASE_URL=database_url, AMQP_URL=amqp_url)
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        assert done.stdout, command


async def test_prune_removes_the_old_runs_of_each_tenant(database_url, amqp_url, engine, broker):
    async with worker(database_url, amqp_url):
        await publish(broker, *[runs.body(tenant_id=tenant, status="succeeded", error_code=...) for tenant in TENANTS])
        await eventually(engine, published_runs(), len(TENANTS))
    async with engine.begin() as conn:
        old = "UPDATE governance.run_completions SET received_at = now() - interval '9 days' WHERE tenant_id <> :one"
        await conn.execute(text(old), {"one": TENANTS[0]})
    done = await closeout("prune", "--older-than", "8d", "--open-incidents", DATABASE_URL=database_url)
    assert done.returncode == 0, done.stderr
    assert await count(engine, "run_completions") == 1
    assert await count(engine, "traces") == 1


async def test_the_relay_publishes_events_of_several_tenants(database_url, amqp_url, engine, broker):
    coordinator = create_transaction_coordinator(engine=engine)  # without a publisher
    for tenant in TENANTS:
        await coordinator.execute(runs.run(tenant_id=tenant))
    events = await listen(broker)
    done = await closeout("outbox", "drain", DATABASE_URL=database_url, AMQP_URL=amqp_url)
    assert done.returncode == 0, done.stderr
    assert len(await received(events, 3 * len(TENANTS))) == 3 * len(TENANTS)
    await eventually(engine, published_runs(), len(TENANTS))


async def test_a_transaction_of_one_tenant_is_not_committed_in_two_phases(database_url, engine, postgres):
    coordinator = create_transaction_coordinator(engine=engine)
    await coordinator.execute_many([runs.run(tenant_id=TENANTS[0]) for _ in range(5)])
    for node in postgres.workers:
        node.psql("ALTER SYSTEM SET log_statement = 'all'")
        node.psql("SELECT pg_reload_conf()")
    try:
        await coordinator.execute_many([runs.run(tenant_id=TENANTS[0]) for _ in range(5)])
        assert prepared_on(postgres) == 0
        await coordinator.execute_many([runs.run(tenant_id=tenant) for tenant in TENANTS])
        assert prepared_on(postgres) == len(postgres.workers)
    finally:
        for node in postgres.workers:
            node.psql("ALTER SYSTEM RESET log_statement")
            node.psql("SELECT pg_reload_conf()")


def prepared_on(postgres: CitusForTests) -> int:
    """Return on how many worker nodes a transaction was prepared for a two-phase commit."""
    return sum("statement: PREPARE TRANSACTION" in node.log.read_text() for node in postgres.workers)


async def test_tables_with_rows_are_distributed_while_runs_arrive(empty_database_url, amqp_url, postgres, broker):
    name = urlsplit(empty_database_url).path.lstrip("/")
    await migrated_by_the_owner(postgres, name)
    owner = create_engine(empty_database_url, pool_size=1)
    stop, published = asyncio.Event(), 0

    async def runner() -> None:
        nonlocal published
        while not stop.is_set():
            await publish(broker, *[runs.body(tenant_id=tenant) for tenant in TENANTS])
            published += len(TENANTS)

    async with worker(empty_database_url, amqp_url):
        running = asyncio.create_task(runner())
        await until(lambda: published > 50)
        done = await closeout("distribute", DATABASE_URL=as_role(empty_database_url, OWNER))
        stop.set()
        await running
        assert done.returncode == 0, done.stderr
        assert "governance.run_completions: now distributed" in done.stdout
        await eventually(owner, published_runs(), published)
    assert [finding.count for finding in await reconcile(owner, older_than_seconds=60)] == [0] * 11
    assert (await closeout("migrate", "--check", DATABASE_URL=empty_database_url)).returncode == 0
    await owner.dispose()


async def test_distribute_is_safe_to_repeat(database_url):
    done = await closeout("distribute", DATABASE_URL=as_role(database_url, OWNER))
    assert done.returncode == 0, done.stderr
    assert "governance.run_completions: already distributed" in done.stdout
    assert "governance.policies: already on every node" in done.stdout


@pytest.mark.parametrize("number", [1, 3])
async def test_workers_may_connect_to_any_node_or_to_several(number, database_url, amqp_url, engine, broker, postgres):
    url = urlsplit(database_url)
    ports = [node.port for node in (*postgres.workers[::-1], postgres)][:number]
    hosts = ",".join(f"{url.hostname}:{port}" for port in ports)
    several = f"postgresql://{url.username}@{hosts}{url.path}?load_balance_hosts=random"
    async with worker(several, amqp_url):
        await publish(broker, *[runs.body(tenant_id=tenant) for tenant in TENANTS for _ in range(5)])
        await eventually(engine, published_runs(), 5 * len(TENANTS))
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'closeout'"
        used = [node for node in (*postgres.workers, postgres) if node.psql(sessions, url.path[1:]) != "0"]
        assert len(used) > (number > 1)  # the test's own session is on the coordinator
    assert [finding.count for finding in await reconcile(engine, older_than_seconds=60)] == [0] * 11
