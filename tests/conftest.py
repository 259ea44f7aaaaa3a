"""Real servers for every test: one PostgreSQL and one RabbitMQ per session, a database and a vhost per test."""

import asyncio
import gc
import itertools
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from servers import PostgresServer, RabbitServer, start_all
from servers.binaries.rabbitmq import DEFAULT_VERSION, Version
from servers.rabbitmq import CONSISTENT_HASH
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from config.logs import configure_logs
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.metrics import Metrics
from consumer.postgres.engine import create_engine
from tests.support.citus_server import CitusForTests
from tests.support.roles import OPERATOR_USER, WORKER_USER, add_users, migrated_by_the_owner, permit

_numbers = itertools.count(1)
_TEMPLATE = "migrated"
# Set in CI: also run the tests on RabbitMQ 3.10 that run on RabbitMQ 4.
_BOTH_VERSIONS = "CLOSEOUT_BOTH_RABBITMQ"
_WITHOUT_PARAMETERS = SimpleNamespace(params={})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move the unit tests to the end, so that a parallel run does not end with one long file.

    Without CLOSEOUT_BOTH_RABBITMQ, deselect the tests on RabbitMQ 3.10.
    """
    items.sort(key=lambda item: "unit" in item.path.parts)
    if not os.environ.get(_BOTH_VERSIONS) and session_rabbitmq_version() == DEFAULT_VERSION:
        older = {item for item in items if "3.10" in getattr(item, "callspec", _WITHOUT_PARAMETERS).params.values()}
        config.hook.pytest_deselected(items=list(older))
        items[:] = [item for item in items if item not in older]


def pytest_collection_finish() -> None:
    """Exempt what was imported and collected from garbage collection: each run of it would visit all of that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_log_handler_is_left() -> Iterator[None]:
    """Remove the log handler of a command that ran in this process: it writes to a stream that is closed by now."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler).__module__ == configure_logs.__module__:
            root.removeHandler(handler)
            root.setLevel(logging.WARNING)


def session_rabbitmq_version() -> Version:
    """Return the RabbitMQ version of tests that do not name one: CLOSEOUT_RABBITMQ, else 4."""
    return cast("Version", os.environ.get("CLOSEOUT_RABBITMQ", DEFAULT_VERSION))


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="closeout-tests-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def start_servers(folder: Path, version: Version) -> tuple[PostgresServer, RabbitServer]:
    """Start both servers in *folder*, with a migrated template database and every user of the definitions."""
    postgres = CitusForTests(folder / "pg") if os.environ.get("CLOSEOUT_CITUS") else PostgresServer(folder / "pg")
    rabbit = RabbitServer(folder / "mq", version=version, plugins=[CONSISTENT_HASH])
    start_all(postgres, rabbit)
    postgres.create_database(_TEMPLATE)
    asyncio.run(migrated_by_the_owner(postgres, _TEMPLATE))
    add_users(rabbit)
    return postgres, rabbit


@pytest.fixture(scope="session")
def servers(folder: Path) -> Iterator[tuple[PostgresServer, RabbitServer]]:
    postgres, rabbit = start_servers(folder, session_rabbitmq_version())
    yield postgres, rabbit
    rabbit.stop()
    postgres.stop()


@pytest.fixture(scope="session")
def postgres(servers: tuple[PostgresServer, RabbitServer]) -> PostgresServer:
    return servers[0]


@pytest.fixture(scope="session")
def rabbit(servers: tuple[PostgresServer, RabbitServer]) -> RabbitServer:
    return servers[1]


@pytest.fixture(scope="session")
def other_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ of the version that `rabbit` does not have."""
    version: Version = "3.10" if session_rabbitmq_version() == "4" else "4"
    with RabbitServer(tmp_path_factory.mktemp("mq"), version=version, plugins=[CONSISTENT_HASH]) as server:
        add_users(server)
        yield server


@pytest.fixture(params=["4", "3.10"])
def any_rabbit(request: pytest.FixtureRequest) -> RabbitServer:
    # Not an async fixture: the fixtures that it requests may start the servers, which runs another event loop.
    server: RabbitServer = request.getfixturevalue(
        "rabbit" if request.param == session_rabbitmq_version() else "other_rabbit"
    )
    return server


@pytest.fixture
def database_url(postgres: PostgresServer) -> Iterator[str]:
    name = f"t{next(_numbers)}"
    yield postgres.create_database(name, template=_TEMPLATE)
    postgres.drop_database(name)


@pytest.fixture
def empty_database_url(postgres: PostgresServer) -> Iterator[str]:
    name = f"t{next(_numbers)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    made = create_engine(database_url, pool_size=8)
    yield made
    await made.dispose()


@pytest.fixture
async def connection(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as conn:
        yield conn


@pytest.fixture
def bare_amqp_url(rabbit: RabbitServer) -> Iterator[str]:
    name = f"t{next(_numbers)}"
    url = rabbit.create_vhost(name)
    for user in (WORKER_USER, OPERATOR_USER):
        permit(rabbit, name, user)
    yield url
    rabbit.delete_vhost(name)


@pytest.fixture
async def broker(bare_amqp_url: str) -> AsyncIterator[BrokerConnection]:
    """A connection to a vhost with the topology declared."""
    made = BrokerConnection(bare_amqp_url, name="tests")
    await declare(made)
    yield made
    await made.close()


@pytest.fixture
def amqp_url(bare_amqp_url: str, broker: BrokerConnection) -> str:
    """The URL of a vhost with the topology declared."""
    return bare_amqp_url


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()
