"""A batch: the messages that have arrived, bounded in number and in bytes."""

from types import SimpleNamespace
from typing import Any, cast

from consumer.delivery.intake import BATCH_MAX_BYTES, Intake
from consumer.metrics import Metrics


def holding(*sizes: int) -> Intake:
    intake = Intake(Metrics())
    for tag, size in enumerate(sizes, 1):
        intake.put(cast("Any", SimpleNamespace(body=bytes(size), delivery_tag=tag)), cast("Any", None))
    return intake


async def taken(intake: Intake, at_most: int) -> list[int]:
    batch = await intake.take(at_most)
    intake.settled(batch)
    return [len(delivery.message.body) for delivery in batch]


async def test_a_batch_has_the_arrived_messages_in_order_up_to_its_maximum():
    intake = holding(1, 2, 3)

    assert [await taken(intake, 2), await taken(intake, 2)] == [[1, 2], [3]]


async def test_a_batch_ends_before_a_message_that_would_exceed_its_size():
    intake = holding(BATCH_MAX_BYTES - 1, 1, 1)

    assert await taken(intake, 100) == [BATCH_MAX_BYTES - 1, 1]


async def test_a_message_larger_than_any_batch_is_a_batch_by_itself():
    intake = holding(BATCH_MAX_BYTES + 1, 1)

    assert [await taken(intake, 100), await taken(intake, 100)] == [[BATCH_MAX_BYTES + 1], [1]]
