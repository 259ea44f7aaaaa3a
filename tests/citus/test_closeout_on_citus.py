"""Closeout on a real Citus cluster: a coordinator and two worker nodes."""

import pytest
from sqlalchemy import text

from consumer.maintenance.reconcile import reconcile
from tests.support import run_messages as runs
from tests.support.broken_writes import count
from tests.support.command_line import closeout
from tests.support.traffic import eventually, publish, published_runs, worker

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


async def test_distribute_is_safe_to_repeat(database_url):
    done = await closeout("distribute", DATABASE_URL=database_url.replace("postgres:", "closeout_owner:"))
    assert done.returncode == 0, done.stderr
    assert "governance.run_completions: already distributed" in done.stdout
    assert "governance.policies: already on every node" in done.stdout
