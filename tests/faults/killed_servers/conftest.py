"""Servers for each module, because these tests kill them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer
from servers.binaries.rabbitmq import Version

from tests.conftest import session_rabbitmq_version, start_servers


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
    postgres, rabbit = start_servers(place, rabbitmq_version)
    yield postgres, rabbit
    rabbit.kill()
    postgres.kill()


@pytest.fixture(scope="module")
def postgres(servers: tuple[PostgresServer, RabbitServer]) -> PostgresServer:
    return servers[0]


@pytest.fixture(scope="module")
def rabbit(servers: tuple[PostgresServer, RabbitServer]) -> RabbitServer:
    return servers[1]
