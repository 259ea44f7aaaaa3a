"""Nodes are killed, added and filled while runs arrive: every run is closed out once, and none is parked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from servers.clusters.citus import CitusNode
from sqlalchemy import text

from consumer.contract.names import PARKED_QUEUE
from consumer.maintenance.reconcile import reconcile
from tests.support import run_messages as runs
from tests.support.broken_writes import count
from tests.support.citus_server import CitusForTests
from tests.support.traffic import emptied, eventually, publish, published_runs, worker
from tests.support.waiting import until

TENANTS = [f"tenant-{number}" for number in range(12)]
NODES = ("the coordinator", "the first node", "the second node")


class Load:
    """Runs that are published one batch after the other, and how many there were."""

    published = 0


@asynccontextmanager
async def load(database_url, amqp_url, engine, broker) -> AsyncIterator[Load]:
    """Run a worker and a runner; at the end, check that each run was closed out once and its events published."""
    done, stop = Load(), asyncio.Event()

    async def runner() -> None:
        while not stop.is_set():
            await publish(broker, *[runs.body(tenant_id=tenant) for tenant in TENANTS for _ in range(3)])
            done.published += 3 * len(TENANTS)
            await asyncio.sleep(0.1)

    async with worker(database_url, amqp_url):
        running = asyncio.create_task(runner())
        try:
            yield done
        finally:
            stop.set()
            await running
        await eventually(engine, published_runs(), done.published)
    for table in ("run_completions", "incidents", "policy_evaluations", "traces"):
        assert await count(engine, table) == done.published, table
    assert await count(engine, "outbox_events") == 0
    assert [finding.count for finding in await reconcile(engine, older_than_seconds=60)] == [0] * 11
    assert await emptied(broker, PARKED_QUEUE) == []


async def more(load: Load, number: int) -> None:
    """Wait until *number* further runs are published."""
    target = load.published + number
    await until(lambda: load.published >= target)


@pytest.mark.parametrize("killed", NODES)
async def test_a_node_is_killed_and_restarted_under_load(killed, database_url, amqp_url, engine, broker, postgres):
    node = postgres.nodes[NODES.index(killed)]
    async with load(database_url, amqp_url, engine, broker) as running:
        for _ in range(2):
            await more(running, 150)
            await asyncio.to_thread(node.kill)
            await more(running, 150)
            await asyncio.to_thread(node.start)
        await more(running, 150)


def finished(postgres: CitusForTests, database: str) -> bool:
    state = postgres.psql("SELECT state FROM citus_rebalance_status() ORDER BY job_id DESC LIMIT 1", database)
    assert state in {"scheduled", "running", "finished"}, postgres.psql(
        "SELECT * FROM citus_rebalance_status()", database
    )
    return state == "finished"


async def test_shards_move_to_an_added_node_under_load(database_url, amqp_url, engine, broker, postgres):
    name = urlsplit(database_url).path.lstrip("/")
    node = CitusNode(postgres.folder.parent, "added")
    node.start()
    try:
        async with load(database_url, amqp_url, engine, broker) as running:
            await more(running, 150)
            await asyncio.to_thread(postgres.join, node, name)
            await asyncio.to_thread(postgres.psql, "SELECT citus_rebalance_start()", name)
            await until(lambda: finished(postgres, name), within=240)
            await more(running, 150)
        shards = "SELECT count(*) FROM citus_shards WHERE nodeport = :port AND table_name::text LIKE '%run_completions'"
        async with engine.connect() as conn:
            assert (await conn.execute(text(shards), {"port": node.port})).scalar_one() > 0
    finally:
        node.kill()
