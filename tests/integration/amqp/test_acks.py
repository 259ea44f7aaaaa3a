"""Acks on a real quorum queue: as few as the order permits, none lost when the channel closes right after them."""

import asyncio

import pytest
from aiormq.abc import DeliveredMessage

from consumer.amqp.acks import Acks
from consumer.amqp.connection import BrokerConnection
from tests.support.traffic import emptied, length_without_consumers, publish
from tests.support.waiting import until

QUEUE = "closeout.run-completed"


class Consumer:
    """A separate channel with *number* deliveries."""

    def __init__(self, url: str) -> None:
        self.connection = BrokerConnection(url, name="acks")
        self.messages: list[DeliveredMessage] = []

    async def open(self, number: int) -> None:
        self.channel = await self.connection.channel(confirms=False)
        await self.channel.basic_qos(prefetch_count=number)
        await self.channel.basic_consume(QUEUE, self._on_message)
        await until(lambda: len(self.messages) >= number)

    async def close(self) -> None:
        await self.channel.close()
        await self.connection.close()

    async def _on_message(self, message: DeliveredMessage) -> None:
        self.messages.append(message)


async def left_after(amqp_url, broker, number, steps, *, single_acks: int = 0) -> list[int]:
    """Run *steps* on the acks of a channel with *number* deliveries, close it, and return the messages left.

    A channel that closes right after *single_acks* loses some of them. As many more deliveries arrive only once the
    queue has them all.
    """
    await publish(broker, *[b"%d" % position for position in range(1, number + 1)])
    consumer = Consumer(amqp_url)
    await consumer.open(number)
    await steps(Acks(consumer.channel, hold_back=100))
    await publish(broker, *[b"%d" % position for position in range(number + 1, number + single_acks + 1)])
    await until(lambda: len(consumer.messages) >= number + single_acks)
    await consumer.close()
    await length_without_consumers(broker, QUEUE)
    left = sorted(int(message.body) for message in await emptied(broker, QUEUE))
    return [position for position in left if position <= number]


@pytest.mark.parametrize("attempt", range(5))
async def test_closing_a_channel_right_after_its_acks_loses_none(amqp_url, broker, attempt):
    async def steps(acks: Acks) -> None:
        for first in range(1, 201, 50):
            for tag in range(first, first + 50):
                acks.ack(tag)
            await acks.flush()

    assert await left_after(amqp_url, broker, 200, steps) == []


async def test_an_unfinished_delivery_is_not_acked_with_later_ones(amqp_url, broker):
    async def steps(acks: Acks) -> None:
        for tag in (1, 2, 4, 5):
            acks.ack(tag)
        await acks.flush()

    # 3 is unfinished: 4 and 5 wait for it, and a channel that dies now hands back all three.
    assert await left_after(amqp_url, broker, 5, steps) == [3, 4, 5]


async def test_held_back_acks_are_sent_once_the_unfinished_delivery_is_done(amqp_url, broker):
    async def steps(acks: Acks) -> None:
        for tag in (1, 2, 4, 5):
            acks.ack(tag)
        await acks.flush()
        acks.ack(3)
        await acks.flush()

    assert await left_after(amqp_url, broker, 5, steps) == []


async def test_a_requeued_delivery_is_not_covered_by_an_ack_of_later_ones(amqp_url, broker):
    async def steps(acks: Acks) -> None:
        await acks.requeue(2)
        for tag in (1, 3):
            acks.ack(tag)
        await acks.flush()

    # 2 may have been redelivered to this consumer; it is requeued when the channel closes.
    assert await left_after(amqp_url, broker, 3, steps) == [2]


async def test_finished_deliveries_are_acked_before_a_channel_is_closed(amqp_url, broker):
    async def steps(acks: Acks) -> None:
        for tag in (2, 3):
            acks.ack(tag)
        await acks.flush(everything=True)

    assert await left_after(amqp_url, broker, 3, steps) == [1]


async def test_an_unfinished_batch_holds_back_only_a_part_of_the_prefetch_count(amqp_url, broker):
    async def steps(acks: Acks) -> None:
        for tag in range(2, 103):
            acks.ack(tag)
        await acks.flush()

    assert await left_after(amqp_url, broker, 102, steps, single_acks=101) == [1]


async def test_concurrent_flushes_ack_each_tag_once(amqp_url, broker):
    """The broker closes the channel on an unknown delivery tag."""

    async def steps(acks: Acks) -> None:
        def flush(*tags: int) -> asyncio.Task[None]:
            for tag in tags:
                acks.ack(tag)
            return asyncio.create_task(acks.flush())

        flushes = [flush(*range(51, 201))]
        for _ in range(3):  # it has started to write, and waits for the connection to drain
            await asyncio.sleep(0)
        flushes += [flush(*range(201, 251)), flush(*range(1, 51))]
        await asyncio.gather(*flushes)
        await acks._channel.basic_qos(prefetch_count=1)  # a response, so the channel is open

    assert await left_after(amqp_url, broker, 250, steps, single_acks=150) == []
