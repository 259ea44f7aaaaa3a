"""Long work yields to the event loop."""

import asyncio

import pytest

from consumer.closeout import yielding as module
from consumer.closeout.yielding import YIELD_AFTER_SECONDS, each


@pytest.fixture
def work_takes(monkeypatch: pytest.MonkeyPatch):
    """Return work that takes a given number of seconds of a fake clock."""
    now = 1_000.0
    monkeypatch.setattr(module, "perf_counter", lambda: now)

    def taking(seconds: float):
        def work(number: int) -> int:
            nonlocal now
            now += seconds
            return 10 * number

        return work

    return taking


async def turns_of_the_loop_during(work) -> tuple[list[int], int]:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)  # it has started
    done = await each(range(4), work)
    counting.cancel()
    return done, turns


async def test_slow_work_yields_to_the_event_loop_after_each_item_and_keeps_the_order(work_takes):
    assert await turns_of_the_loop_during(work_takes(1.2 * YIELD_AFTER_SECONDS)) == ([0, 10, 20, 30], 3)


async def test_quick_work_does_not_yield_to_the_event_loop(work_takes):
    assert await turns_of_the_loop_during(work_takes(YIELD_AFTER_SECONDS / 4)) == ([0, 10, 20, 30], 0)
