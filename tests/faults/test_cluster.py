"""Three nodes of RabbitMQ behind one address; each is killed in its turn under load, the queue's leader first."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from servers import PostgresServer
from servers.rabbitmq_cluster import RabbitCluster, RabbitNode

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.contract.names import RUN_COMPLETED_QUEUE
from tests.support.fault_scenario import Scene
from tests.support.proxy import Proxy

pytestmark = pytest.mark.timeout(240)

VHOST = "cluster"
# Seconds: a killed node's clients connect anew, and a queue that it led has elected another leader.
RESUME_SECONDS = 5.0


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[RabbitCluster]:
    made = RabbitCluster(folder / "cluster")
    try:
        yield made.start()
    finally:
        made.kill()


@pytest.fixture
async def scene(
    cluster: RabbitCluster, postgres: PostgresServer, database_url: str, tmp_path: Path
) -> AsyncIterator[Scene]:
    await asyncio.to_thread(cluster.any_running.create_vhost, VHOST)
    made = Scene(postgres, cluster.any_running, database_url.rsplit("/", 1)[1], VHOST, tmp_path)
    made.broker_line = await Proxy(*cluster.ports).accept()
    made.broker = BrokerConnection(_through(made.broker_line, cluster.any_running), name="runner")
    await declare(made.broker)
    await made.set_up()
    try:
        yield made
    finally:
        await made.take_down()


async def test_killing_each_cluster_node_in_turn_under_load_loses_nothing(scene: Scene, cluster: RabbitCluster, report):
    async with scene.worker() as worker:
        await scene.publish(20)
        await scene.all_closed_out()
        leader = await scene.aside(cluster.leader, RUN_COMPLETED_QUEUE, VHOST)
        said = []
        async with scene.load():
            for victim in [leader, *(node for node in cluster.nodes if node is not leader)]:
                scene.rabbit = next(node for node in cluster.nodes if node is not victim)
                await scene.aside(victim.kill)
                before = await scene.count("run_completions")

                async def works(before: int = before) -> bool:
                    return await scene.count("run_completions") > before + 5

                said.append(await scene.until(works, within=60, what="commits on two nodes"))
                await scene.aside(cluster.start)
        again = await scene.settle_books(worker, within=60)
        took = ", ".join(f"{seconds:.1f}" for seconds in said)
        report(f"work went on after {took} s; {len(scene.bodies)} runs, {again} events repeated")
        assert max(said) <= RESUME_SECONDS


def _through(line: Proxy, node: RabbitNode) -> str:
    return node.url(VHOST).replace(f":{node.port}/", f":{line.port}/")
