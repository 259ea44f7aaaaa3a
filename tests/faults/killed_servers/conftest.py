"""Servers for each module, because these tests kill them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer

from tests.conftest import start_servers


@pytest.fixture(scope="module")
def servers(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[PostgresServer, RabbitServer]]:
    place = folder / request.module.__name__
    place.mkdir()
    place.chmod(0o755)
    postgres, rabbit = start_servers(place)
    yield postgres, rabbit
    rabbit.kill()
    postgres.kill()


@pytest.fixture(scope="module")
def postgres(servers: tuple[PostgresServer, RabbitServer]) -> PostgresServer:
    return servers[0]


@pytest.fixture(scope="module")
def rabbit(servers: tuple[PostgresServer, RabbitServer]) -> RabbitServer:
    return servers[1]
