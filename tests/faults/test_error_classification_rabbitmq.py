"""``fault_of`` classifies each error that RabbitMQ and aiormq raise."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop
from aiormq import spec
from aiormq.channel import Channel

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.names import EVENTS_EXCHANGE, RUN_COMPLETED_KEY, RUN_COMPLETED_QUEUE, RUNS_EXCHANGE
from consumer.errors import Fault, UnavailableError, fault_of
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(100)


@pytest.fixture
async def connection(scenario: Scenario) -> AsyncIterator[BrokerConnection]:
    """The worker's own user, through the proxy."""
    made = BrokerConnection(scenario.environ["AMQP_URL"], name="errors")
    yield made
    await made.close()


async def _publish(connection: BrokerConnection, exchange: str, **properties: Any) -> None:
    channel = await connection.channel(confirms=True)
    await channel.basic_publish(
        b"x", exchange=exchange, routing_key="x", properties=spec.Basic.Properties(**properties), timeout=3, wait=False
    )


async def no_exchange_404(connection: BrokerConnection, _: Scenario) -> None:
    await _publish(connection, "not.there")


async def no_queue_404(connection: BrokerConnection, _: Scenario) -> None:
    channel = await connection.channel(confirms=False)
    await channel.basic_consume("not.there", lambda _message: asyncio.sleep(0))


async def no_right_403(connection: BrokerConnection, scenario: Scenario) -> None:
    await scenario.in_thread(scenario.rabbit.permit, scenario.user, scenario.vhost, "^$", "^$", ".*")
    await _publish(connection, EVENTS_EXCHANGE)


async def no_right_to_configure_403(connection: BrokerConnection, _: Scenario) -> None:
    channel = await connection.channel(confirms=False)
    await channel.queue_declare("mine")


async def wrong_user_406(connection: BrokerConnection, _: Scenario) -> None:
    await _publish(connection, EVENTS_EXCHANGE, user_id="somebody-else")


async def unknown_tag_406(connection: BrokerConnection, _: Scenario) -> None:
    channel = await connection.channel(confirms=False)
    await channel.basic_ack(4711, wait=False)
    await _ends(channel)


async def connection_forced(connection: BrokerConnection, scenario: Scenario) -> None:
    channel = await connection.channel(confirms=True)
    await scenario.in_thread(scenario.rabbit.eval, 'rabbit_networking:close_all_connections(<<"maintenance">>)')
    await asyncio.sleep(0.1)
    await channel.basic_publish(b"x", exchange=EVENTS_EXCHANGE, routing_key="x", timeout=3)


async def wrong_password(_: BrokerConnection, scenario: Scenario) -> None:
    await BrokerConnection(scenario.environ["AMQP_URL"].replace(":pw@", ":no@"), name="x").channel(confirms=False)


async def no_vhost(_: BrokerConnection, scenario: Scenario) -> None:
    await BrokerConnection(scenario.rabbit.url("not-there"), name="x").channel(confirms=False)


async def broker_refuses(connection: BrokerConnection, scenario: Scenario) -> None:
    scenario.broker_proxy.refuse()
    await connection.channel(confirms=False)


async def broker_silent(connection: BrokerConnection, scenario: Scenario) -> None:
    """The connection is accepted and nothing is ever sent: our timeout for opening applies."""
    scenario.broker_proxy.stall()
    await connection.channel(confirms=False)


async def closed_in_the_handshake(connection: BrokerConnection, scenario: Scenario) -> None:
    scenario.broker_proxy.breaks = [(0, False)]
    await connection.channel(confirms=False)


async def closed_before_the_handshake(connection: BrokerConnection, scenario: Scenario) -> None:
    """A load balancer, or a listener, without a broker behind it."""
    scenario.broker_proxy.targets = [1]
    await connection.channel(confirms=False)


async def reset_in_the_handshake(connection: BrokerConnection, scenario: Scenario) -> None:
    scenario.broker_proxy.breaks = [(1, True)]
    await connection.channel(confirms=False)


async def cut_while_waiting_for_a_confirm(connection: BrokerConnection, scenario: Scenario) -> None:
    confirmed = ConfirmedChannel(connection)
    await confirmed.opened()
    scenario.broker_proxy.stall()
    asyncio.get_running_loop().call_later(0.2, scenario.broker_proxy.cut)
    await confirmed.send(
        exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=b"x", properties=spec.Basic.Properties()
    )


async def confirm_never_comes(connection: BrokerConnection, scenario: Scenario) -> None:
    """Our timeout for a confirm applies."""
    confirmed = ConfirmedChannel(connection)
    await confirmed.opened()
    scenario.broker_proxy.stall()
    await confirmed.send(
        exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=b"x", properties=spec.Basic.Properties()
    )


async def cut_while_waiting_for_an_answer(connection: BrokerConnection, scenario: Scenario) -> None:
    channel = await connection.channel(confirms=False)
    scenario.broker_proxy.stall()
    asyncio.get_running_loop().call_later(0.2, scenario.broker_proxy.cut)
    await channel.basic_qos(prefetch_count=1, timeout=5)


async def published_in_an_alarm(connection: BrokerConnection, scenario: Scenario) -> None:
    confirmed = ConfirmedChannel(connection)
    try:
        await scenario.in_thread(scenario.rabbit.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.00001)")
        for _ in range(2):  # the broker sends connection.blocked to a publisher
            await confirmed.send(
                exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=b"x", properties=spec.Basic.Properties()
            )
    finally:
        await scenario.in_thread(scenario.rabbit.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.6)")


async def channel_used_after_its_end(connection: BrokerConnection, _: Scenario) -> None:
    channel = await connection.channel(confirms=False)
    await channel.close()
    await channel.basic_publish(b"x", exchange=EVENTS_EXCHANGE, routing_key="x")


async def not_routed(connection: BrokerConnection, _: Scenario) -> None:
    await ConfirmedChannel(connection).send(
        exchange=RUNS_EXCHANGE, routing_key="nobody.listens", body=b"x", properties=spec.Basic.Properties()
    )


BROKER = [
    no_exchange_404, no_queue_404, no_right_403, no_right_to_configure_403, wrong_user_406, unknown_tag_406,
    connection_forced, wrong_password, no_vhost, broker_refuses, broker_silent, closed_in_the_handshake,
    closed_before_the_handshake,
    reset_in_the_handshake, cut_while_waiting_for_a_confirm, confirm_never_comes, cut_while_waiting_for_an_answer,
    published_in_an_alarm, channel_used_after_its_end, not_routed,
]  # fmt: skip


# The cases that wait for one of our timeouts of ten seconds.
SILENT = {broker_silent, confirm_never_comes, published_in_an_alarm}


@pytest.mark.parametrize("happens", BROKER, ids=[b.__name__ for b in BROKER])
async def test_broker_errors_are_classified_as_transient(
    scenario: Scenario, connection: BrokerConnection, happens, monkeypatch: pytest.MonkeyPatch
):
    if happens in SILENT:
        monkeypatch.setattr("consumer.amqp.connection.OPEN_TIMEOUT_SECONDS", 2.0)
        monkeypatch.setattr("consumer.amqp.confirmed_channel.CONFIRM_TIMEOUT_SECONDS", 2.0)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - CancelledError included
        await happens(connection, scenario)
    assert isinstance(caught.value, (*BROKER_ERRORS, UnavailableError)), repr(caught.value)
    assert fault_of(caught.value) is Fault.TRANSIENT, repr(caught.value)


async def _ends(channel: Channel) -> None:
    """Raise the error that closes *channel*; fail if it stays open, since a TimeoutError would count as transient."""
    done, _ = await asyncio.wait([channel.closing], timeout=30)
    assert done, "nothing closed the channel"
    await channel.closing


# start, tune, open-ok; the channel's open-ok, qos-ok, consume-ok: after each of them, and before the first.
@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("responses", range(6))
async def test_a_connection_lost_after_any_response_is_a_transient_error_for_a_consumer(
    scenario: Scenario, connection: BrokerConnection, responses: int, how: str
):
    """No CancelledError, no StopAsyncIteration: they would end the worker, or count an attempt."""
    scenario.broker_proxy.breaks = [(responses, how == "reset")]

    async def consume() -> None:
        channel = await connection.channel(confirms=False)
        await channel.basic_qos(prefetch_count=1, timeout=5)
        await channel.basic_consume(RUN_COMPLETED_QUEUE, lambda _message: asyncio.sleep(0), timeout=5)
        await _ends(channel)

    with pytest.raises((UnavailableError, *BROKER_ERRORS)):
        await consume()


async def test_a_listener_without_a_broker_behind_it_is_a_transient_error_in_a_worker(scenario: Scenario):
    """A load balancer without a broker: uvloop sees the end of the connection before aiormq reads it."""
    scenario.broker_proxy.targets = [1]

    async def connect() -> list[BaseException]:
        found: list[BaseException] = []
        for _ in range(20):
            try:
                await BrokerConnection(scenario.environ["AMQP_URL"], name="x").channel(confirms=False)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the error is the result
                found.append(error)
        return found

    found = await asyncio.to_thread(uvloop.run, connect())
    assert len(found) == 20
    assert {type(error) for error in found} == {UnavailableError}
