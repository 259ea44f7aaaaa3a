"""``closeout doctor`` on the broker: every check, on real servers of both major versions in the matching state."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiormq import spec
from servers import RabbitServer

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.intake_topology import move
from consumer.amqp.topology import TOPOLOGY, declare, without_overflow
from consumer.contract.names import RUN_COMPLETED_QUEUE, consumed_queues
from consumer.diagnosis.broker import examine_broker, version_check
from consumer.diagnosis.check import Check
from tests.support import run_messages as runs
from tests.support.command_line import closeout
from tests.support.traffic import listen, publish, worker
from tests.support.waiting import until

ALL = ["rabbitmq", "topology", "consumers", "retries", "parked", "consume", "alarm", "publish"]
# The permissions of a worker's user in README and deployments: none to configure.
WRITE, READ = r"^(governance\.events|closeout\.internal)$", r"^closeout\.run-completed(\.[0-9]+)?$"
_names = itertools.count()


class Place:
    """A vhost with the topology declared, and users with chosen permissions in it."""

    def __init__(self, server: RabbitServer, vhost: str) -> None:
        self.server, self.vhost = server, vhost
        self.url = server.create_vhost(vhost)
        self.broker = BrokerConnection(self.url, name="tests")

    def user(self, configure: str = "^$", write: str = WRITE, read: str = READ) -> str:
        return self.server.add_user(f"u{next(_names)}", "pw", configure, write, read, self.vhost)


@pytest.fixture
async def place(any_rabbit: RabbitServer) -> AsyncIterator[Place]:
    made = Place(any_rabbit, f"doctor{next(_names)}")
    await declare(made.broker)
    yield made
    await made.broker.close()
    any_rabbit.delete_vhost(made.vhost)


async def examined(url: str, intake_queues: int = 1) -> dict[str, Check]:
    connection = BrokerConnection(url, name="closeout doctor")
    found = await examine_broker(connection, intake_queues)
    await connection.close()
    assert all(check.remedy for check in found if check.state != "ok")
    return {check.name: check for check in found}


def troubled(checks: dict[str, Check]) -> dict[str, str]:
    return {name: str(check.state) for name, check in checks.items() if check.state != "ok"}


async def consume(place: Place, *, prefetch: int = 1, queue: str = RUN_COMPLETED_QUEUE) -> None:
    """Consume like a worker that never acks."""
    channel = await place.broker.channel(confirms=False)
    await channel.basic_qos(prefetch_count=prefetch)

    async def hold(_message: Any) -> None:
        pass

    await channel.basic_consume(queue, hold)


async def put(place: Place, queue: str) -> None:
    await ConfirmedChannel(place.broker).send(
        exchange="", routing_key=queue, body=b"{}", properties=spec.Basic.Properties()
    )


async def test_a_declared_topology_passes_every_check_without_publishing_a_message(place):
    events = await listen(place.broker)
    await consume(place)

    of_worker, of_admin = await examined(place.user()), await examined(place.url)

    assert troubled(of_worker) == troubled(of_admin) == {}
    assert list(of_worker) == list(of_admin) == ALL
    assert of_admin["topology"].found == "3 exchanges and 3 queues exist, as declared"
    assert "only a user with configure permission can compare" in of_worker["topology"].found
    assert of_worker["rabbitmq"].found == f"reachable, version {place.server.full_version}"
    assert events == []
    for queue in ("closeout.run-completed", "closeout.parked", "closeout.run-completed.retry"):
        channel = await place.broker.channel(confirms=False)
        output = await channel.queue_declare(queue, passive=True)
        assert (output.message_count, output.consumer_count) == (0, int(queue == "closeout.run-completed"))


async def test_an_unavailable_or_refusing_broker_is_the_only_problem_reported(place):
    away = await examined("amqp://u:p@127.0.0.1:1/")
    refused = await examined(place.server.url(place.vhost, password="wrong"))
    elsewhere = await examined(place.server.url("nowhere"))

    assert list(away) == list(refused) == list(elsewhere) == ["rabbitmq"]
    assert away["rabbitmq"].found.startswith("not reachable: [Errno 111] ")
    assert "ACCESS_REFUSED" in refused["rabbitmq"].found
    assert troubled(elsewhere) == {"rabbitmq": "problem"}


@pytest.mark.parametrize(("version", "state"), [("3.9.13", "problem"), ("3.10.8", "ok"), ("4.0.5", "ok"), ("?", "ok")])
def test_a_broker_older_than_required_is_a_problem(version, state):
    """The private servers are newer; only the rule is tested."""
    assert version_check(version).state == state


async def test_every_missing_queue_exchange_and_binding_is_named(place):
    channel = await place.broker.channel(confirms=False)
    await channel.queue_delete("closeout.parked")
    await channel.exchange_delete("runs")

    checks = await examined(place.user())

    assert checks["topology"].state == "problem"
    assert checks["topology"].found == "exchange runs is missing; queue closeout.parked is missing"
    assert "closeout topology" in checks["topology"].remedy
    assert "parked" not in checks


async def test_a_missing_topology_does_not_stop_the_other_checks(place):
    vhost = Place(place.server, f"doctor{next(_names)}")

    checks = await examined(vhost.url)

    assert checks["topology"].found.count("missing") == 6
    assert "NOT_FOUND" in checks["publish"].found
    assert "closeout topology" in checks["publish"].remedy
    channel = await vhost.broker.channel(confirms=False)
    with pytest.raises(Exception, match="NOT_FOUND"):  # the check declares nothing
        await channel.queue_declare("closeout.parked", passive=True)
    await vhost.broker.close()


async def test_a_user_with_configure_permission_reports_queues_with_other_properties(place):
    channel = await place.broker.channel(confirms=False)
    await channel.queue_delete("closeout.parked")
    await channel.queue_declare("closeout.parked", durable=True)
    await channel.exchange_delete("governance.events")
    await channel.exchange_declare("governance.events", exchange_type="fanout", durable=True)

    checks = await examined(place.url)

    assert checks["topology"].state == "problem"
    assert "exchange governance.events exists with other properties: 'type'" in checks["topology"].found
    assert "queue closeout.parked exists with other properties: 'x-" in checks["topology"].found
    assert (await examined(place.user()))["topology"].state == "ok"


async def test_a_parked_queue_that_may_drop_messages_is_a_warning(place):
    await consume(place)
    channel = await place.broker.channel(confirms=False)
    await channel.queue_delete("closeout.parked")
    arguments = dict(without_overflow(TOPOLOGY.queues[0].arguments))
    await channel.queue_declare("closeout.parked", durable=True, arguments=arguments)
    await channel.queue_bind("closeout.parked", "closeout.internal", routing_key="closeout.parked")

    checks = await examined(place.url)

    assert troubled(checks) == {"parked limit": "warning"}
    assert "max-length policy could drop messages" in checks["parked limit"].found


async def test_no_consumer_is_a_warning_and_a_problem_with_messages_waiting(place):
    assert troubled(await examined(place.user())) == {"consumers": "warning"}
    await publish(place.broker, runs.body())

    checks = await examined(place.user())

    assert troubled(checks) == {"consumers": "problem"}
    assert checks["consumers"].found == "1 message ready in closeout.run-completed, 0 consumers"
    assert "/readyz" in checks["consumers"].remedy


async def test_a_backlog_is_a_warning_despite_a_consumer(place, monkeypatch):
    monkeypatch.setattr("consumer.diagnosis.queues._BACKLOG", 20)
    await publish(place.broker, *(runs.body() for _ in range(25)))
    await consume(place, prefetch=1)

    checks = await examined(place.user())

    assert troubled(checks) == {"consumers": "warning"}
    assert "add workers" in checks["consumers"].remedy


async def test_parked_messages_and_retries_are_warnings(place):
    await consume(place)
    await put(place, "closeout.parked")
    await put(place, "closeout.parked")
    await put(place, "closeout.run-completed.retry")

    checks = await examined(place.user())

    assert troubled(checks) == {"retries": "warning", "parked": "warning"}
    assert checks["parked"].found == "2 messages in closeout.parked"
    assert "closeout parked list" in checks["parked"].remedy


async def test_a_missing_permission_to_consume_is_a_problem(place):
    await consume(place)

    checks = await examined(place.user(read="^$"))

    assert troubled(checks) == {"consume": "problem"}
    assert "ACCESS_REFUSED" in checks["consume"].found


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (r"^closeout\.internal$", "governance.events"),
        (r"^amq\.default$", "governance.events"),
        (r"^governance\.events$", "closeout.internal"),
    ],
)
async def test_each_missing_permission_to_publish_is_a_problem(place, write, named):
    await consume(place)

    checks = await examined(place.user(write=write))

    assert troubled(checks) == {"publish": "problem"}
    assert checks["publish"].found.startswith(f"{named}: ACCESS_REFUSED")
    assert named in checks["publish"].remedy


async def test_permission_to_write_to_every_queue_is_a_warning(place):
    await consume(place)

    checks = await examined(place.user(write=r"^(governance\.events|amq\.default)$"))

    assert troubled(checks) == {"publish": "warning"}
    assert checks["publish"].found.startswith("closeout.internal: ACCESS_REFUSED")
    assert "then revoke amq.default" in checks["publish"].remedy


async def test_a_resource_alarm_is_a_problem(place):
    await consume(place)
    await asyncio.to_thread(place.server.ctl, "set_vm_memory_high_watermark", "0")
    try:
        checks = await examined(place.user())
    finally:
        await asyncio.to_thread(place.server.ctl, "set_vm_memory_high_watermark", "0.9")

    assert troubled(checks) == {"alarm": "problem"}
    assert "memory or disk alarm" in checks["alarm"].found
    assert "publish" not in checks  # it cannot be checked, and is not reported as existing


async def test_several_intake_queues_are_checked_one_by_one(place):
    await move(place.broker, 2)
    for queue in consumed_queues(2)[:-1]:
        await consume(place, queue=queue)

    checks = await examined(place.user(), 2)
    put_into = consumed_queues(2)[-1]
    await put(place, put_into)
    waiting = await examined(place.user(), 2)
    await consume(place, queue=put_into)
    working = await examined(place.user(), 2)
    refused = await examined(place.user(read=r"^closeout\.run-completed(\.0)?$"), 2)

    assert troubled(checks) == {"consumers": "warning"}
    assert checks["consumers"].found == f"0 messages ready in {put_into}, 0 consumers"
    assert troubled(waiting) == {"consumers": "problem"}
    assert troubled(working) == {}
    assert working["topology"].found.startswith("4 exchanges and 5 queues exist")
    assert working["plugin"].state == "ok"
    assert "closeout.run-completed.1" in working["consume"].found
    assert troubled(refused) == {"consume": "problem"}
    assert refused["consume"].remedy == "grant the worker's user read on closeout.run-completed.1"


async def test_an_unused_intake_queue_is_a_warning_and_with_messages_and_no_consumer_a_problem(place):
    await consume(place)
    await move(place.broker, 3)
    await move(place.broker, 1)

    empty = await examined(place.user())
    await put(place, "closeout.run-completed.1")
    waiting = await examined(place.user())
    await consume(place, queue="closeout.run-completed.1")
    consumed = await examined(place.user())

    assert troubled(empty) == {"unused": "warning"}
    assert "--delete-unused" in empty["unused"].remedy
    assert troubled(waiting) == {"unused": "problem"}
    assert "closeout.run-completed.1: 1 message, 0 consumers" in waiting["unused"].found
    assert waiting["unused"].found.endswith("; INTAKE_QUEUES is 1")
    assert troubled(consumed) == {"unused": "warning"}


async def test_the_command_prints_one_line_per_check_and_exits_0_next_to_a_live_worker(database_url, amqp_url, broker):
    urls = {"DATABASE_URL": database_url, "AMQP_URL": amqp_url, "TRANSACTION_COORDINATOR_ENABLED": "true"}
    async with worker(database_url, amqp_url) as service:
        await until(lambda: _consuming(broker))
        await until(lambda: service.http.port)
        output = await closeout("doctor", **urls)
        plainly = await closeout("doctor", "--json", **urls)

    assert output.returncode == plainly.returncode == 0, output.stdout
    lines = [line.split() for line in output.stdout.splitlines() if not line.strip().startswith("to do:")]
    assert [tuple(line[:2]) for line in lines[:-1]] == [
        ("ok", "settings"), ("ok", "encryption"), ("ok", "encryption"), ("ok", "coordinator"),
        ("ok", "postgresql"), ("ok", "writable"), ("warning", "role"), ("ok", "clock"), ("ok", "connections"),
        ("ok", "durability"), ("ok", "schema"), ("ok", "rights"), ("ok", "outbox"), ("ok", "unfinished"),
        *(("ok", name) for name in ALL),
    ]  # fmt: skip
    assert output.stdout.splitlines()[-1] == "0 problems, 1 warning, 21 ok"
    found = json.loads(plainly.stdout)
    assert (found["problems"], found["warnings"], found["ok"]) == (0, 1, 21)
    assert found["checks"][0] == {"name": "settings", "state": "ok", "found": "valid", "remedy": ""}


async def test_every_invalid_setting_is_reported_and_the_other_checks_still_run(database_url):
    done = await closeout(
        "doctor", "--json",
        DATABASE_URL=database_url, PREFETCH_COUNT="many", LOG_LEVEL="LOUD", BATCH_MAX_RUNS="1000",
        LEGACY_FALLBACK_ENABLED="true", TRUSTED_PUBLISHERS=",",
    )  # fmt: skip

    assert done.returncode == 1
    checks = json.loads(done.stdout)["checks"]
    faults = [check["found"] for check in checks if (check["name"], check["state"]) == ("settings", "problem")]
    assert [fault.split(":")[0] for fault in sorted(faults)] == ["AMQP_URL", "LOG_LEVEL", "PREFETCH_COUNT"]
    warned = [check["found"] for check in checks if (check["name"], check["state"]) == ("settings", "warning")]
    assert any("BATCH_MAX_RUNS=1000 is never reached" in words for words in warned)
    assert any("TRUSTED_PUBLISHERS is set but empty" in words for words in warned)
    states = {check["name"]: check["state"] for check in checks}
    assert (states["coordinator"], states["fallback"], states["postgresql"]) == ("warning", "warning", "ok")
    assert "rabbitmq" not in states


async def test_a_rollout_by_tenant_is_a_warning_that_names_the_tenants(database_url):
    done = await closeout(
        "doctor", DATABASE_URL=database_url, TRANSACTION_COORDINATOR_ENABLED="true",
        TRANSACTION_COORDINATOR_TENANTS="b,a", DATABASE_URL_FILE="",
    )  # fmt: skip

    assert "warning  coordinator  enabled for a, b only" in done.stdout


async def _consuming(broker: BrokerConnection) -> bool:
    channel = await broker.channel(confirms=False)
    output = await channel.queue_declare("closeout.run-completed", passive=True)
    await channel.close()
    return bool(output.consumer_count)
