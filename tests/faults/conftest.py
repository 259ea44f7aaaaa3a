"""A scenario per test: a worker's user, role and proxied connections on the session's servers."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer
from servers.clusters.rabbitmq import RabbitCluster

from tests.support.faults.scenario import Scenario


@pytest.fixture
async def scenario(
    postgres: PostgresServer, rabbit: RabbitServer, database_url: str, amqp_url: str, tmp_path: Path
) -> AsyncIterator[Scenario]:
    made = Scenario(postgres, rabbit, database_url.rsplit("/", 1)[1], amqp_url.rsplit("/", 1)[1], tmp_path)
    await made.set_up()
    try:
        yield made
    finally:
        for server in (postgres, rabbit):  # a failed test may have left one suspended or stopped
            if server.running:
                server.resume()
            else:
                server.start()
        await made.take_down()


@pytest.fixture(scope="module")
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[RabbitCluster]:
    """Three RabbitMQ nodes, running."""
    made = RabbitCluster(folder / request.module.__name__.rpartition(".")[2])
    try:
        yield made.start()
    finally:
        made.kill()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print the measurements; CLOSEOUT_FAULTS_REPORT names a file to which they are appended."""

    def write(line: str) -> None:
        line = f"{request.node.name}: {line}"
        print(line)  # noqa: T201 - pytest shows it with -s, and where a test fails
        if path := os.environ.get("CLOSEOUT_FAULTS_REPORT"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return write
