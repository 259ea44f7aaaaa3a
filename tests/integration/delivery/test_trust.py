"""TRUSTED_PUBLISHERS: accepted publishers, as verified by the broker, and the user id of a replay."""

import pytest
from servers import RabbitServer

from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import PARKED_QUEUE
from consumer.errors import UnavailableError
from consumer.parked.copies import headers_of
from consumer.parked.operations import Filters, replay
from tests.support import run_messages as runs
from tests.support.traffic import emptied, eventually, has_length, parked, publish, published_runs, worker
from tests.support.waiting import until

UNTRUSTED = Filters(reason="untrusted_publisher")


@pytest.fixture
def user(rabbit: RabbitServer, amqp_url: str):
    """Add a user of the vhost with a unique name; return a connection as that user, and the name."""
    vhost = amqp_url.rpartition("/")[2]

    def add(name: str) -> tuple[BrokerConnection, str]:
        full = f"{name}-{vhost}"
        return BrokerConnection(rabbit.add_user(full, "pw", "^$", ".*", ".*", vhost), name=name), full

    return add


async def test_the_broker_refuses_a_message_with_the_user_id_of_another_user(user, broker):
    runner, _ = user("runner")
    _, other = user("other")
    with pytest.raises(UnavailableError) as refused:
        await publish(runner, runs.body(), user_id=other)
    assert "PRECONDITION_FAILED - user_id property set to" in str(refused.value)
    assert await emptied(broker, "closeout.run-completed") == []
    await runner.close()


async def test_messages_of_unlisted_publishers_are_parked_with_their_user_id(
    user, database_url, amqp_url, engine, broker
):
    runner, trusted = user("runner")
    stranger, name = user("stranger")
    async with worker(database_url, amqp_url, TRUSTED_PUBLISHERS=trusted):
        await publish(runner, runs.body(), user_id=trusted)
        await publish(stranger, runs.body(), user_id=name)
        await publish(runner, runs.body())  # trusted, but without a user_id
        found = await parked(broker, 2)
        await eventually(engine, published_runs(), 1)
    assert [headers_of(message)["x-closeout-reason"] for message in found] == ["untrusted_publisher"] * 2
    assert {headers_of(message).get("x-closeout-user-id") for message in found} == {name, None}
    errors = {str(headers_of(message)["x-closeout-error"]) for message in found}
    assert any(name in words for words in errors)
    for connection in (runner, stranger):
        await connection.close()


async def test_replayed_messages_carry_the_operators_user_id_which_must_be_trusted(
    user, database_url, amqp_url, engine, broker
):
    stranger, name = user("stranger")
    operator, operator_name = user("operator")
    async with worker(database_url, amqp_url, TRUSTED_PUBLISHERS="nobody-else", AMQP_URL=amqp_url):
        await publish(stranger, runs.body(), user_id=name)
        await until(lambda: has_length(broker, PARKED_QUEUE, 1))

        assert (await replay(operator, UNTRUSTED, rows=1)).count == 1
        await until(lambda: has_length(broker, PARKED_QUEUE, 1))
        (again,) = await emptied(broker, PARKED_QUEUE)
        assert headers_of(again)["x-closeout-user-id"] == operator_name
        await publish(stranger, again.body, user_id=name)
        await until(lambda: has_length(broker, PARKED_QUEUE, 1))

        # The worker's own user is always trusted: its copies return from the retry queue.
        assert (await replay(broker, UNTRUSTED, rows=1)).count == 1
        await eventually(engine, published_runs(), 1)
    async with worker(database_url, amqp_url, TRUSTED_PUBLISHERS=operator_name):
        await publish(stranger, runs.body(), user_id=name)
        await until(lambda: has_length(broker, PARKED_QUEUE, 1))
        assert (await replay(operator, UNTRUSTED, rows=1)).count == 1
        await eventually(engine, published_runs(), 2)
    for connection in (stranger, operator):
        await connection.close()


async def test_a_trusted_publisher_may_publish_runs_of_any_tenant(user, database_url, amqp_url, engine, broker):
    """The setting lists publishers, not their tenants: a runner is responsible for the tenant that it names."""
    runner, trusted = user("runner")
    async with worker(database_url, amqp_url, TRUSTED_PUBLISHERS=trusted):
        await publish(runner, runs.body(tenant_id="acme"), runs.body(tenant_id="globex"), user_id=trusted)
        await eventually(engine, published_runs(), 2)
    await runner.close()
