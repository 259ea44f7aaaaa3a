"""Three nodes of RabbitMQ behind one address; each is killed in turn under load, the queue's leader first."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from servers import PostgresServer
from servers.clusters.rabbitmq import RabbitCluster, RabbitNode

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.contract.names import RUN_COMPLETED_QUEUE
from tests.support.faults.endurance import RESUME_SECONDS
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.proxy import Proxy
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(240)

VHOST = "cluster"


@pytest.fixture
async def scenario(
    cluster: RabbitCluster, postgres: PostgresServer, database_url: str, tmp_path: Path
) -> AsyncIterator[Scenario]:
    await asyncio.to_thread(cluster.any_running.create_vhost, VHOST)
    made = Scenario(postgres, cluster.any_running, database_url.rsplit("/", 1)[1], VHOST, tmp_path)
    made.broker_proxy = await Proxy(*cluster.ports).accept()
    made.broker = BrokerConnection(_through(made.broker_proxy, cluster.any_running), name="runner")
    await declare(made.broker)
    await made.set_up()
    try:
        yield made
    finally:
        await made.take_down()


async def test_killing_each_cluster_node_in_turn_under_load_loses_nothing(
    scenario: Scenario, cluster: RabbitCluster, report
):
    async with scenario.worker() as worker:
        await scenario.publish(20)
        await scenario.all_closed_out()
        leader = await scenario.in_thread(cluster.leader, RUN_COMPLETED_QUEUE, VHOST)
        measured = []
        async with scenario.load():
            for victim in [leader, *(node for node in cluster.nodes if node is not leader)]:
                scenario.rabbit = next(node for node in cluster.nodes if node is not victim)
                await scenario.in_thread(victim.kill)
                before = await scenario.count("run_completions")

                async def works(before: int = before) -> bool:
                    return await scenario.count("run_completions") > before + 5

                measured.append(await scenario.until(works, what="commits on two nodes"))
                await scenario.in_thread(cluster.start)
        again = await assert_invariants(scenario, worker)
        took = ", ".join(f"{seconds:.1f}" for seconds in measured)
        report(f"commits after {took} s; {len(scenario.bodies)} runs, {again} events repeated")
        assert max(measured) <= RESUME_SECONDS


def _through(proxy: Proxy, node: RabbitNode) -> str:
    return node.url(VHOST).replace(f":{node.port}/", f":{proxy.port}/")
