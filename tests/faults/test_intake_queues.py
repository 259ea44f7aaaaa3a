"""Several intake queues under load: the number of queues changes, and one queue becomes unavailable."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from servers import PostgresServer
from servers.clusters.rabbitmq import RabbitCluster, RabbitNode

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.intake_topology import move, topology_for
from consumer.amqp.topology import Queue, declare
from consumer.contract.names import RUN_COMPLETED_QUEUE, consumed_queues, numbered_queues
from tests.support import run_messages as runs
from tests.support.command_line import Done, closeout
from tests.support.faults.database_locks import lock_table
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.proxy import Proxy
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.roles import TOPOLOGY_USER, as_user, permit

pytestmark = pytest.mark.timeout(240)

VHOST = "intake"
LOST = "closeout.run-completed.1"


@pytest.fixture
async def topology_url(scenario: Scenario) -> str:
    await scenario.in_thread(permit, scenario.rabbit, scenario.vhost, TOPOLOGY_USER)
    return as_user(scenario.rabbit.url(scenario.vhost), TOPOLOGY_USER)


async def topology(url: str, intake_queues: int, *options: str) -> Done:
    done = await closeout("topology", *options, AMQP_URL=url, INTAKE_QUEUES=str(intake_queues))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


async def works(scenario: Scenario, number: int = 20) -> None:
    before = await scenario.count("run_completions")

    async def more() -> bool:
        return await scenario.count("run_completions") >= before + number

    await scenario.until(more, what=f"{number} more runs")


async def emptied(scenario: Scenario, queues: tuple[str, ...]) -> None:
    async def empty() -> bool:
        return not any([await scenario.length(queue) for queue in queues])

    await scenario.until(empty, what="empty queues")


async def ready(worker: RunningWorker) -> None:
    await Scenario.until(worker.ready, what="readiness")


async def warned(worker: RunningWorker) -> bool:
    return "closeout.run-completed.3 is not consumed" in (await worker.state()).get("warning", "")


@pytest.mark.parametrize("first", ["workers", "topology"])
async def test_moving_the_intake_to_four_queues_and_back_under_load_loses_nothing(
    scenario: Scenario, topology_url: str, first: str
):
    one = await scenario.start()
    async with scenario.load():
        await works(scenario)
        # To four queues: workers first, or topology first. Runs wait in the second case, and are not lost.
        if first == "workers":
            four = await scenario.start(INTAKE_QUEUES="4")
            await ready(four)
            await scenario.until(lambda: warned(four), what="a warning about the missing queues")
            assert await one.stop() == 0
            await works(scenario)
            await topology(topology_url, 4)
        else:
            await topology(topology_url, 4)
            assert await one.stop() == 0
            four = await scenario.start(INTAKE_QUEUES="4")

        async def without_warning() -> bool:
            state = await four.state()
            return bool(state["ready"]) and "warning" not in state

        await scenario.until(without_warning, what="every queue consumed")
        await works(scenario)
        # Back to one.
        await topology(topology_url, 1)
        await works(scenario)
        await emptied(scenario, numbered_queues(4))
        assert await four.stop() == 0
        one = await scenario.start()
        await ready(one)
        await topology(topology_url, 1, "--delete-unused")
        await works(scenario)

    await assert_invariants(scenario, one)
    assert await one.stop() == 0


async def test_a_deleted_intake_queue_is_reported_and_the_others_are_consumed_until_it_is_declared_again(
    scenario: Scenario, topology_url: str, report
):
    await topology(topology_url, 4)
    scenario.intake_queues = 4
    async with scenario.worker(INTAKE_QUEUES="4") as worker:
        await scenario.publish(20)
        await scenario.all_closed_out()
        channel = await scenario.broker.channel(confirms=False)
        await channel.queue_delete(LOST)  # empty: messages in a deleted queue are lost by the operator's decision
        await channel.close()
        took = await _reported(worker)
        assert "queue may have been deleted" in (state := await worker.state())["warning"], state
        await scenario.publish(20)
        await scenario.all_closed_out()
        cpu, lines = worker.cpu_seconds(), len(worker.records())
        await asyncio.sleep(4)
        assert worker.cpu_seconds() - cpu < 1
        assert len(worker.records()) - lines < 16
        assert "closeout topology" in (await worker.state())["warning"]

        await topology(topology_url, 4)

        back = await _consumed_again(worker)
        await scenario.publish(20)
        await assert_invariants(scenario, worker)
        report(f"reported after {took:.1f} s, consumed again {back:.1f} s after its declaration")


async def test_all_intake_queues_deleted_pause_the_worker_until_they_are_declared_again(
    scenario: Scenario, topology_url: str
):
    await topology(topology_url, 2)
    scenario.intake_queues = 2
    async with scenario.worker(INTAKE_QUEUES="2") as worker:
        await scenario.publish(10)
        await scenario.all_closed_out()
        channel = await scenario.broker.channel(confirms=False)
        for queue in consumed_queues(2):
            await channel.queue_delete(queue)
        await channel.close()

        async def paused() -> bool:
            state = await worker.state()
            return not state["ready"] and "closeout topology" in state["reason"] and "warning" not in state

        await scenario.until(paused, what="a pause")
        assert await worker.metric(_series(LOST)) == 0
        await topology(topology_url, 2)
        await ready(worker)
        await scenario.publish(10)
        await assert_invariants(scenario, worker)


async def test_a_worker_of_several_queues_resumes_after_its_connections_are_closed(
    scenario: Scenario, topology_url: str
):
    await topology(topology_url, 3)
    scenario.intake_queues = 3
    async with scenario.worker(INTAKE_QUEUES="3") as worker:
        async with scenario.load():
            await works(scenario)
            for _ in range(3):
                await scenario.in_thread(
                    scenario.rabbit.eval, 'rabbit_networking:close_all_connections(<<"maintenance">>)'
                )
                await asyncio.sleep(1)
            await works(scenario)
        await assert_invariants(scenario, worker)


async def test_stopping_a_worker_of_several_queues_under_load_redelivers_no_committed_run(
    scenario: Scenario, topology_url: str
):
    await topology(topology_url, 3)
    scenario.intake_queues = 3
    first = await scenario.start(INTAKE_QUEUES="3")
    await ready(first)
    publishing = [asyncio.create_task(scenario.publish_body(runs.body())) for _ in range(1_500)]
    await works(scenario, 50)
    assert await first.stop() == 0
    await asyncio.gather(*publishing)
    assert await scenario.count("run_completions") < 1_500

    async with scenario.worker(INTAKE_QUEUES="3") as second:
        assert await assert_invariants(scenario, second) == 0
        assert await second.metric('closeout_deliveries_total{result="duplicate"}') == 0


async def test_all_intake_queues_share_one_prefetch_count(scenario: Scenario, topology_url: str):
    await topology(topology_url, 3)
    scenario.intake_queues = 3
    async with scenario.worker(INTAKE_QUEUES="3", PREFETCH_COUNT="41", BATCH_MAX_RUNS="5") as worker:
        await ready(worker)
        async with lock_table(scenario, "run_completions"):
            await asyncio.gather(*(scenario.publish_body(runs.body()) for _ in range(120)))

            async def full() -> bool:
                return await scenario.unacked() == 30  # three of four shares of ten: no retry is waiting

            await scenario.until(full, what="all shares in use")
            assert await worker.metric("closeout_inflight_deliveries") == 30
        await assert_invariants(scenario, worker)


@pytest.fixture
async def clustered(
    cluster: RabbitCluster, postgres: PostgresServer, database_url: str, tmp_path: Path
) -> AsyncIterator[Scenario]:
    await asyncio.to_thread(cluster.any_running.create_vhost, VHOST)
    made = Scenario(postgres, cluster.any_running, database_url.rsplit("/", 1)[1], VHOST, tmp_path)
    # The workers' node is never killed.
    made.broker_proxy = await Proxy(*cluster.ports).accept()
    made.broker = BrokerConnection(cluster.nodes[0].url(VHOST), name="runner")
    yield made
    await made.take_down()
    await asyncio.to_thread(cluster.any_running.delete_vhost, VHOST)


async def test_the_leaders_of_the_intake_queues_are_balanced_over_the_nodes(
    clustered: Scenario, cluster: RabbitCluster
):
    await move(clustered.broker, 3)

    leaders = [await clustered.in_thread(cluster.leader, queue, VHOST) for queue in numbered_queues(3)]

    # "balanced" counts all queues of the node, also the three others.
    assert len({node.node for node in leaders}) >= 2


async def test_an_intake_queue_without_a_leader_is_reported_and_the_others_are_consumed_until_it_returns(
    clustered: Scenario, cluster: RabbitCluster, report
):
    scenario, victim = clustered, cluster.nodes[1]
    await _declare_with_one_replica(LOST, victim)
    scenario.intake_queues = 3
    await scenario.set_up()
    async with scenario.worker(INTAKE_QUEUES="3") as worker:
        await scenario.publish(20)
        await scenario.all_closed_out()
        await scenario.in_thread(victim.kill)
        took = await _reported(worker)
        # Each run is published until it is confirmed; those of the lost queue are not, until it returns.
        publishing = [asyncio.create_task(scenario.publish_body(runs.body())) for _ in range(30)]
        await works(scenario, 10)
        again = await scenario.start(INTAKE_QUEUES="3")  # RabbitMQ refuses its consumer of the lost queue
        await ready(again)
        await _reported(again)
        publishing += [asyncio.create_task(scenario.publish_body(runs.body())) for _ in range(30)]
        await works(scenario, 10)
        assert await worker.ready()
        assert await again.stop() == 0
        assert not all(task.done() for task in publishing)
        await scenario.in_thread(cluster.start)
        back = await _consumed_again(worker)
        await asyncio.gather(*publishing)
        await assert_invariants(scenario, worker)
        report(f"reported after {took:.1f} s, consumed again {back:.1f} s after the node's start")


async def _declare_with_one_replica(name: str, node: RabbitNode) -> None:
    """Declare three queues, *name* with *node* as its only member."""
    connection = BrokerConnection(node.url(VHOST), name="tests")
    whole = topology_for(3)
    queues = tuple(
        Queue(queue.name, MappingProxyType({**own, "x-quorum-initial-group-size": 1})) if queue.name == name else queue
        for queue in whole.queues
        if (own := {key: value for key, value in queue.arguments.items() if key != "x-queue-leader-locator"})
    )
    await declare(connection, replace(whole, queues=queues))
    await connection.close()


def _series(queue: str) -> str:
    return f'closeout_intake_queue_unavailable{{queue="{queue}"}}'


async def _reported(worker: RunningWorker) -> float:
    """Wait until the worker reports the lost queue in every place; return the seconds it took."""

    async def named() -> bool:
        state = await worker.state()
        return bool(state["ready"]) and LOST in state.get("warning", "")

    took = await Scenario.until(named, what="a warning")
    assert await worker.metric(_series(LOST)) == 1
    assert await worker.metric(_series(RUN_COMPLETED_QUEUE)) == 0
    assert await worker.metric("closeout_consumer_paused") == 0
    assert any(
        record["event"] == "queue not consumed; others are" and record["queue"] == LOST for record in worker.records()
    )
    return took


async def _consumed_again(worker: RunningWorker) -> float:
    async def gone() -> bool:
        state = await worker.state()
        return bool(state["ready"]) and "warning" not in state

    took = await Scenario.until(gone, what="no warning")
    assert await worker.metric(_series(LOST)) == 0
    assert any(record["event"] == "queue consumed again" for record in worker.records())
    return took
