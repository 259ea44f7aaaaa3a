"""Requests to the broker of which only the refusal is of interest."""

import asyncio
from collections.abc import Awaitable, Callable

from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.batch_publish import why_closed
from consumer.amqp.channel import ChannelLostError, not_cancelled
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.errors import one_line

# Seconds for a response. In an alarm a broker reads nothing and does not respond.
RESPONSE_SECONDS = 10.0
# Replaces a refusal if the broker did not respond.
SILENCE = "no response"


async def refusal_of(connection: BrokerConnection, request: Callable[[AmqpChannel], Awaitable[object]]) -> str:
    """Return the broker's refusal of a request on a separate channel; empty if it does not refuse."""
    channel = await connection.channel(confirms=True)
    try:
        with not_cancelled():
            async with asyncio.timeout(RESPONSE_SECONDS):
                await request(channel)
            await channel.close()
    except TimeoutError:
        return SILENCE
    except ChannelLostError:
        reason = await why_closed(channel, within=RESPONSE_SECONDS)
        return one_line(reason) if reason else SILENCE
    except BROKER_ERRORS as error:
        return one_line(error)
    return ""
