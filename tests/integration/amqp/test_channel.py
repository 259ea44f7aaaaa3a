"""A channel whose connection ends while an operation waits on it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from consumer.amqp.channel import Channel
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.errors import UnavailableError

Call = Callable[[BrokerConnection, Channel], Awaitable[object]]

CALLS: dict[str, Call] = {
    "opening another": lambda connection, _: connection.channel(confirms=True),
    "cancelling a consumer": lambda _, channel: channel.basic_cancel("none", timeout=5),
    "closing": lambda _, channel: channel.close(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_missed_heartbeat_raises_a_transient_error_instead_of_a_cancellation(bare_amqp_url, call):
    connection = BrokerConnection(bare_amqp_url, name="heartbeat")
    channel = await connection.channel(confirms=False)
    waiting = asyncio.create_task(call(connection, channel))
    for _ in range(3):  # the request is written, the response not read
        await asyncio.sleep(0)
    channel.connection._reader_task.cancel()  # type: ignore[attr-defined] # as the client does where nothing came
    with pytest.raises((*BROKER_ERRORS, UnavailableError)):
        await asyncio.wait_for(asyncio.shield(waiting), 60)
    await connection.close()
