"""A scenario on the session's servers, and the code of an older version."""

import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer

from consumer.postgres.engine import create_engine
from tests.support.faults.scenario import Scenario
from tests.support.schemas import bring_to

# Code for schema 0001 only: `git archive` of consumer, domains and config at commit 9cf7bbd, the last one before
# 0002. Kept as a file, so that these tests also run in a clone without that history.
OLDER_VERSION = Path(__file__).with_name("workers-of-0001.tar.xz")
# Without the checkout, which an editable installation and the working directory would put first.
RUN_OLDER = (sys.executable, "-P", "-c", "import consumer.cli; consumer.cli.main()")


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the older version's code; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(OLDER_VERSION) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
async def scenario(
    postgres: PostgresServer, rabbit: RabbitServer, database_url: str, amqp_url: str, tmp_path: Path
) -> AsyncIterator[Scenario]:
    made = Scenario(postgres, rabbit, database_url.rsplit("/", 1)[1], amqp_url.rsplit("/", 1)[1], tmp_path)
    await made.set_up()
    try:
        yield made
    finally:
        await made.take_down()


@pytest.fixture
async def scenario_at_0001(
    postgres: PostgresServer, rabbit: RabbitServer, empty_database_url: str, amqp_url: str, tmp_path: Path
) -> AsyncIterator[Scenario]:
    """A scenario whose database no version after the first has migrated."""
    engine = create_engine(empty_database_url, pool_size=1)
    await bring_to(engine, "0001")
    await engine.dispose()
    made = Scenario(postgres, rabbit, empty_database_url.rsplit("/", 1)[1], amqp_url.rsplit("/", 1)[1], tmp_path)
    await made.set_up()
    # As rights.sql does: a worker may read every table.
    await made.sql(f"GRANT SELECT ON governance.schema_version TO {made.role}")
    try:
        yield made
    finally:
        await made.take_down()
