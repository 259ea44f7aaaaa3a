"""Several intake queues: where runs go, and what the move from one number of queues to another leaves."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pika
import pytest
from servers import RabbitServer
from servers.binaries.rabbitmq import Version

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.intake_topology import Moved, move
from consumer.amqp.topology import TopologyMismatchError
from consumer.contract.names import RUN_COMPLETED_QUEUE, RUNS_EXCHANGE, consumed_queues, numbered_queues
from consumer.diagnosis.broker import examine_broker
from tests.support import roles
from tests.support.command_line import closeout
from tests.support.traffic import emptied, publish, queue_length

_names = itertools.count()


class Place:
    """A vhost, an administrator's connection, and one of the user that declares the topology."""

    def __init__(self, server: RabbitServer) -> None:
        self.server, self.vhost = server, f"intake{next(_names)}"
        self.url = server.create_vhost(self.vhost)
        roles.permit(server, self.vhost, roles.TOPOLOGY_USER)
        self.broker = BrokerConnection(self.url, name="tests")
        self.topology_url = roles.as_user(self.url, roles.TOPOLOGY_USER)
        self.topology = BrokerConnection(self.topology_url, name="closeout topology")

    async def move(self, intake_queues: int, *, delete_unused: bool = False) -> Moved:
        return await move(self.topology, intake_queues, delete_unused=delete_unused)

    async def lengths(self, intake_queues: int) -> list[int]:
        return [await queue_length(self.broker, queue) for queue in consumed_queues(intake_queues)]

    def names(self, of: str) -> set[str]:
        listed = json.loads(self.server.ctl(f"list_{of}", "-p", self.vhost, "name", "--formatter", "json"))
        return {entry["name"] for entry in listed if entry["name"].startswith("closeout.")}


@pytest.fixture
async def place(any_rabbit: RabbitServer) -> AsyncIterator[Place]:
    made = Place(any_rabbit)
    yield made
    await made.broker.close()
    await made.topology.close()
    any_rabbit.delete_vhost(made.vhost)


async def test_runs_are_spread_evenly_over_the_queues_by_message_id(place):
    await place.move(4)
    for _ in range(400):
        await publish(place.broker, b"{}", message_id=str(uuid4()))

    own, *numbered = await place.lengths(4)

    assert own == 0
    assert sum(numbered) == 400
    assert min(numbered) > 60


async def test_runs_without_a_message_id_all_go_to_one_queue(place):
    await place.move(4)
    # aiormq gives each message an id.
    connection = await asyncio.to_thread(pika.BlockingConnection, pika.URLParameters(place.url))
    channel = connection.channel()
    channel.confirm_delivery()
    for _ in range(20):
        channel.basic_publish(RUNS_EXCHANGE, "run.completed", b"{}", mandatory=True)
    connection.close()

    assert sorted(await place.lengths(4)) == [0, 0, 0, 0, 20]


async def test_every_message_reaches_a_queue_while_the_number_of_queues_changes(place):
    await place.move(1)
    sent: list[str] = []
    enough = asyncio.Event()

    async def keep_publishing() -> None:
        while not enough.is_set():
            name = str(uuid4())
            await publish(place.broker, b"{}", message_id=name)  # mandatory: raises for a message without a queue
            sent.append(name)

    publishing = asyncio.create_task(keep_publishing())
    for number in (4, 2, 3, 1, 4, 1):
        await place.move(number)
        await asyncio.sleep(0.1)
    enough.set()
    await publishing

    arrived = [
        message.header.properties.message_id
        for queue in consumed_queues(4)
        for message in await emptied(place.broker, queue)
    ]
    assert len(sent) > 50
    assert set(arrived) == set(sent)


async def test_moving_is_idempotent_and_prints_what_it_changed(place):
    await place.move(3)
    environ = {"AMQP_URL": place.topology_url}

    grown = await closeout("topology", INTAKE_QUEUES="3", **environ)
    again = await closeout("topology", INTAKE_QUEUES="3", **environ)
    back = await closeout("topology", INTAKE_QUEUES="1", **environ)
    machine = await closeout("topology", "--json", INTAKE_QUEUES="1", **environ)

    assert grown.returncode == again.returncode == back.returncode == 0, grown.stderr + back.stderr
    assert grown.stdout == again.stdout
    lines = grown.stdout.splitlines()
    assert lines[-2:] == [
        "binding runs --run.completed--> closeout.intake",
        "removed: binding runs --run.completed--> closeout.run-completed",
    ]
    assert back.stdout.splitlines()[-4:] == [
        "removed: binding runs --run.completed--> closeout.intake",
        *(f"not used any more: queue {queue}: 0 messages, 0 consumers" for queue in numbered_queues(3)),
    ]
    assert json.loads(machine.stdout)["unused"][0] == {
        "name": "closeout.run-completed.0", "messages": 0, "consumers": 0,
    }  # fmt: skip


async def test_unused_queues_are_deleted_only_without_messages_and_consumers(place):
    before = await place.move(1)
    assert before.removed == before.unused == []
    await place.move(3)
    channel = await place.broker.channel(confirms=True)
    await channel.basic_publish(b"{}", routing_key="closeout.run-completed.1")
    await place.move(1)

    refused = await closeout("topology", "--delete-unused", INTAKE_QUEUES="1", AMQP_URL=place.topology_url)

    assert refused.returncode == 1
    assert "removed: queue closeout.run-completed.2" in refused.stdout
    assert "not used any more: queue closeout.run-completed.1: 1 message, 0 consumers" in refused.stdout
    assert "neither messages nor consumers" in refused.stderr
    await emptied(place.broker, "closeout.run-completed.1")
    done = await place.move(1, delete_unused=True)
    assert done.unused == []
    assert done.removed[-1] == "exchange closeout.intake"
    assert place.names("queues") == {"closeout.parked", RUN_COMPLETED_QUEUE, "closeout.run-completed.retry"}
    assert place.names("exchanges") == {"closeout.internal"}
    assert (await place.move(1, delete_unused=True)).removed == []


async def test_a_retry_returns_to_a_queue_that_workers_consume_with_any_number_of_queues(place):
    await place.move(2)
    channel = await place.broker.channel(confirms=True)
    await channel.basic_publish(b"{}", routing_key="closeout.run-completed.retry")

    async with asyncio.timeout(30):
        while await place.lengths(2) != [1, 0, 0]:
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("version", ["4", "3.10"])
async def test_a_missing_plugin_is_named_and_changes_no_binding(version: Version, tmp_path: Path):
    with RabbitServer(tmp_path, version=version) as bare:
        url = bare.create_vhost("bare")
        connection = BrokerConnection(url, name="tests")
        await move(connection, 1)

        with pytest.raises(TopologyMismatchError, match="rabbitmq-plugins enable rabbitmq_consistent_hash_exchange"):
            await move(connection, 2)

        await publish(connection, b"{}")
        assert await queue_length(connection, RUN_COMPLETED_QUEUE) == 1
        checks = {check.name: check for check in await examine_broker(connection, 2)}
        assert checks["plugin"].state == "problem"
        assert "rabbitmq_consistent_hash_exchange" in checks["plugin"].remedy
        assert "exchange closeout.intake is missing" in checks["topology"].found
        assert "plugin" not in {check.name for check in await examine_broker(connection, 1)}
        await connection.close()
