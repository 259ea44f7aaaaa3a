"""Separate servers for each file, because these tests kill them; one scenario per test."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer, start_all
from servers.binaries.rabbitmq import Version

from tests.conftest import session_rabbitmq_version
from tests.support.fault_scenario import Scene
from tests.support.roles import add_users, migrated_by_the_owner

_TEMPLATE = "migrated"


@pytest.fixture(scope="module")
def rabbitmq_version() -> Version:
    return session_rabbitmq_version()


@pytest.fixture(scope="module")
def servers(
    folder: Path, request: pytest.FixtureRequest, rabbitmq_version: Version
) -> Iterator[tuple[PostgresServer, RabbitServer]]:
    place = folder / f"{request.module.__name__}-{rabbitmq_version}"
    place.mkdir()
    place.chmod(0o755)
    postgres, rabbit = PostgresServer(place / "pg"), RabbitServer(place / "mq", version=rabbitmq_version)
    start_all(postgres, rabbit)
    postgres.create_database(_TEMPLATE)
    asyncio.run(migrated_by_the_owner(postgres, _TEMPLATE))
    add_users(rabbit)
    yield postgres, rabbit
    rabbit.kill()
    postgres.kill()


@pytest.fixture(scope="module")
def postgres(servers: tuple[PostgresServer, RabbitServer]) -> PostgresServer:
    return servers[0]


@pytest.fixture(scope="module")
def rabbit(servers: tuple[PostgresServer, RabbitServer]) -> RabbitServer:
    return servers[1]


@pytest.fixture
async def scene(
    postgres: PostgresServer, rabbit: RabbitServer, database_url: str, amqp_url: str, tmp_path: Path
) -> AsyncIterator[Scene]:
    made = Scene(postgres, rabbit, database_url.rsplit("/", 1)[1], amqp_url.rsplit("/", 1)[1], tmp_path)
    await made.set_up()
    try:
        yield made
    finally:
        for server in (postgres, rabbit):  # a failed test may leave a server suspended or down
            if server.running:
                server.resume()
            else:
                server.start()
        await made.take_down()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a measurement, and append it to the file that CLOSEOUT_FAULTS_REPORT names."""

    def write(line: str) -> None:
        line = f"{request.node.name}: {line}"
        print(line)  # noqa: T201 - pytest shows it with -s, and where a test fails
        if path := os.environ.get("CLOSEOUT_FAULTS_REPORT"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return write
