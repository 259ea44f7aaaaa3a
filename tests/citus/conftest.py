"""A Citus cluster as the PostgreSQL of these tests, where CITUS_PG_BIN names one; without it they are not run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.clusters.citus import find_citus

from tests.support.citus_server import CitusForTests

collect_ignore_glob = [] if find_citus() else ["test_*"]


@pytest.fixture(scope="session")
def postgres(folder: Path) -> Iterator[CitusForTests]:
    server = CitusForTests(folder / "citus")
    server.start()
    yield server
    server.kill()
