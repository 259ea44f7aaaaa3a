"""Connections to the HTTP port that send nothing cost the worker no run and no file descriptor that it needs."""

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from consumer.http_limits import CONNECTIONS_MAX, HEAD_SECONDS
from tests.support.command_line import CLOSEOUT
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.http import request

pytestmark = pytest.mark.timeout(180)

FEW_FILES = ("sh", "-c", 'ulimit -n 1024; exec "$0" "$@"', CLOSEOUT)


@pytest.fixture(autouse=True)
def _enough_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def connections(port: int, number: int, sent: bytes) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Hold *number* connections, each of which has *sent* the beginning of a request."""
    held = []
    for _ in range(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        held.append((reader, writer))
    try:
        yield [reader for reader, _ in held]
    finally:
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["idle", "half a head"])
async def test_idle_connections_take_no_file_descriptor_and_no_run(scenario: Scenario, report, sent: bytes):
    worker = await scenario.start(command=FEW_FILES)
    await scenario.until(worker.ready, what="the worker")
    async with connections(worker.port, 1300, sent) as readers:
        await scenario.publish(50)
        took = await scenario.all_closed_out()
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await worker.get(path))[0] == 200
        assert open_files(worker) < CONNECTIONS_MAX + 100
        assert sum(reader.at_eof() or reader.exception() is not None for reader in readers) >= 1300 - CONNECTIONS_MAX
        # A server that restarts meanwhile is reached again: new connections need descriptors, too.
        scenario.database_proxy.cut()
        scenario.broker_proxy.cut()
        await scenario.publish(50)
        await scenario.all_closed_out()
    report(f"1,300 connections: 50 runs in {took:.1f} s")
    await assert_invariants(scenario)
    assert await worker.stop() == 0


async def test_a_head_that_does_not_arrive_in_time_ends_the_connection(scenario: Scenario):
    async with scenario.worker() as worker, connections(worker.port, 1, b"GET /livez HTTP/1.1\r\n") as (reader,):
        started = asyncio.get_running_loop().time()
        async with asyncio.timeout(HEAD_SECONDS * 10):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        assert asyncio.get_running_loop().time() - started > HEAD_SECONDS / 2


async def test_a_kept_connection_serves_several_requests_and_is_closed_when_idle(scenario: Scenario):
    async with scenario.worker() as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        for _ in range(3):
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()
        assert (await request(worker.port, "/livez")).status == 200


def open_files(worker: RunningWorker) -> int:
    assert worker.process is not None
    return len(list(Path(f"/proc/{worker.process.pid}/fd").iterdir()))
