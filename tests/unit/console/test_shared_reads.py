"""One read for all viewers, and its frequency."""

import asyncio
from collections.abc import Callable

import pytest

from consumer.console import shared_reads as readings
from consumer.console.shared_reads import PATIENCE_SECONDS, BusyError, GivenUpError, SharedRead
from consumer.errors import UnavailableError


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(readings, "monotonic", made)
    return made


class Server:
    """Returns the number of its reads after *takes* seconds of the test's clock, or fails."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.reads, self.takes = clock, 0, 0.0
        self.error: Exception | None = None

    async def read(self) -> int:
        self.reads += 1
        await asyncio.sleep(0)
        if isinstance(self.clock, Clock):
            self.clock.now += self.takes
        if self.error is not None:
            raise self.error
        return self.reads


async def test_concurrent_requests_share_one_read_and_a_fresh_result_is_reused(clock):
    server = Server(clock)
    shared = SharedRead("it", server.read)
    assert {reading.value for reading in await asyncio.gather(*(shared.latest() for _ in range(50)))} == {1}
    clock.now += 0.9
    assert (await shared.latest()).value == 1
    clock.now += 0.2
    assert (await shared.latest()).value == 2


async def test_a_slow_read_is_repeated_less_often_up_to_a_limit(clock):
    server = Server(clock)
    shared = SharedRead("it", server.read)
    for takes, pause in ((0.1, 3.0), (5.0, 20.0)):
        server.takes = takes
        clock.now += 100
        before = (await shared.latest()).value
        clock.now += pause - 0.1
        assert (await shared.latest()).value == before
        clock.now += 0.2
        server.takes = 0.0
        assert (await shared.latest()).value != before


@pytest.mark.parametrize(
    ("error", "is_slow", "pause"),
    [
        (
            UnavailableError("away"),
            False,
            1.0,
        ),  # queried again soon: an unavailable server has no load
        (BusyError("busy"), True, 1.0),
        (GivenUpError("given up"), True, 20.0),
        (KeyError("a bug"), False, 1.0),
    ],
)
async def test_a_failed_read_keeps_the_last_result_and_reports_the_error(clock, error, is_slow, pause):
    server = Server(clock)
    shared = SharedRead("it", server.read)
    known = await shared.latest()
    clock.now += 10
    server.error, server.takes = error, 2.0
    reading = await shared.latest()
    assert (reading.value, reading.read_at) == (known.value, known.read_at)
    assert str(error) in (reading.fault or "")
    assert reading.is_slow == is_slow
    clock.now += pause + 0.1
    server.error = None
    assert (await shared.latest()).fault is None


async def test_requests_do_not_wait_for_an_unresponsive_server_and_share_one_query(clock):
    silence = asyncio.Event()
    reads: list[int] = []

    async def read() -> str:
        reads.append(1)
        await silence.wait()
        return "at last"

    shared = SharedRead("it", read)
    async with asyncio.timeout(10):  # 0.6, plus the delay of a busy machine
        reading = await shared.latest()
    assert reading.value is None
    assert (reading.fault or "").startswith("it has not responded for 0.")
    assert reading.is_slow
    clock.now += PATIENCE_SECONDS
    async with asyncio.timeout(PATIENCE_SECONDS - 0.1):  # the patience for this read is already used up
        assert (await shared.latest()).fault == "it has not responded for 0.6 s"
    silence.set()
    await shared.settle(1)
    assert (await shared.latest()).value == "at last"
    assert len(reads) == 1
