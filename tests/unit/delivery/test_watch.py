"""The probes of both servers: a silent one is reported, unless deliveries show that it works."""

import asyncio
from itertools import count

import pytest

from consumer.delivery import watch
from consumer.delivery.watch import watch_servers
from consumer.errors import UnavailableError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INTERVAL_SECONDS", "RESPONSE_SECONDS", "_LATE_SECONDS"):
        monkeypatch.setattr(watch, name, 0.02)


async def responds() -> None:
    """Return at once."""


async def hangs() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise UnavailableError("PostgreSQL is not available: gone")


@pytest.mark.parametrize(
    ("probe", "reason"),
    [(hangs, "RabbitMQ has not responded for 0.02 s"), (fails, "PostgreSQL is not available: gone")],
)
async def test_a_server_that_hangs_or_fails_is_named(probe, reason):
    probes = {"other": responds, "RabbitMQ": probe}

    assert await watch_servers(asyncio.Event(), probes, progress=lambda: 0) == reason


async def test_a_late_response_under_load_is_no_outage():
    released, leaving, seen = asyncio.Event(), asyncio.Event(), count()

    def progress() -> int:
        number = next(seen)
        if number == 20:
            released.set()
        return number

    async def late() -> None:
        await released.wait()
        leaving.set()

    assert await watch_servers(leaving, {"RabbitMQ": late}, progress=progress) is None


async def test_a_worker_that_leaves_ends_the_watch_at_once():
    leaving = asyncio.Event()
    watching = asyncio.create_task(watch_servers(leaving, {"RabbitMQ": hangs}, progress=count().__next__))
    await asyncio.sleep(0)

    leaving.set()

    assert await watching is None
