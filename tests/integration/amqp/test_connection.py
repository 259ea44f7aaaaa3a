"""A connection to a real RabbitMQ ends when it is closed."""

import asyncio

import pytest

from consumer.amqp.connection import BrokerConnection
from tests.support.waiting import until


@pytest.mark.parametrize("turns", [1, 10])
async def test_a_connection_whose_close_is_cancelled_is_closed_all_the_same(turns, amqp_url, rabbit):
    connection = BrokerConnection(amqp_url, name=(name := f"cancelled after {turns}"))
    await connection.channel(confirms=False)

    async def listed() -> bool:
        return name in await asyncio.to_thread(rabbit.ctl, "list_connections", "client_properties")

    await until(listed)
    closing = asyncio.create_task(connection.close())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing

    async def gone() -> bool:
        return not await listed()

    await until(gone)
