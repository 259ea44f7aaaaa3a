"""Long work leaves the event loop its turns."""

import asyncio
from time import perf_counter

from consumer.turns import TURN_SECONDS, each


def slowly(number: int) -> int:
    began = perf_counter()
    while perf_counter() - began < 1.2 * TURN_SECONDS:
        pass
    return 10 * number


async def turns_of_the_loop_during(work) -> tuple[list[int], int]:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)  # it has begun
    done = await each(range(4), work)
    counting.cancel()
    return done, turns


async def test_slow_work_lets_others_have_a_turn_after_each_item_and_keeps_the_order():
    assert await turns_of_the_loop_during(slowly) == ([0, 10, 20, 30], 3)


async def test_quick_work_is_done_in_one_turn():
    assert await turns_of_the_loop_during(lambda number: number) == ([0, 1, 2, 3], 0)
