"""Two versions of the worker on one database and one queue, as in every rolling deployment and every rollback."""

from pathlib import Path

import pytest
from sqlalchemy import text

from consumer.errors import UnavailableError
from consumer.postgres.engine import create_engine
from consumer.postgres.readiness import probe
from domains.migrations.compatibility import OLDEST_SCHEMA
from domains.migrations.upgrade import Migrated, migrate, newest
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.schemas import bring_to, revisions
from tests.support.upgrade_load import COMMITTED, FEW, works
from tests.upgrades.conftest import RUN_OLDER

pytestmark = pytest.mark.timeout(90)

DUPLICATE = 'closeout_deliveries_total{result="duplicate"}'


async def both_know(scenario: Scenario, *workers: RunningWorker) -> None:
    """Publish closed-out runs again until each of *workers* has recognized one as a duplicate.

    If their digests differed, one worker would park the other's runs as conflicts.
    """
    known = scenario.bodies[:10]

    async def both_do() -> bool:
        for body in known:
            await scenario.publish_body(body)
        return all([await worker.metric(DUPLICATE) > 0 for worker in workers])

    await scenario.until(both_do, what="a duplicate at each worker")


async def migrated(scenario: Scenario) -> Migrated:
    engine = create_engine(scenario.postgres.url(scenario.database), pool_size=1)
    try:
        return await migrate(engine)
    finally:
        await engine.dispose()


async def test_an_upgrade_and_downgrade_under_load_lose_and_park_nothing(scenario_at_0001: Scenario, older: Path):
    scenario = scenario_at_0001
    old_version = {"PYTHONPATH": str(older), **FEW}
    async with scenario.load(pause=0.04):
        old = await scenario.start(command=RUN_OLDER, **old_version)
        await works(scenario, old)

        new = await scenario.start(**FEW)
        await scenario.until(lambda: _says(new, "run closeout migrate"), what="the reason of its pause")
        assert (await new.state())["reason"] == (
            "PostgreSQL's schema is at 0001 and has no outbox_events.set_aside_until; "
            f"this worker needs {OLDEST_SCHEMA}: run closeout migrate"
        )
        await works(scenario, old)
        assert await new.metric(COMMITTED) == 0

        assert await migrated(scenario) == ("0001", newest())
        await scenario.grant()
        await scenario.until(new.ready, what="the newer worker's work")
        await works(scenario, old, new)
        await both_know(scenario, old, new)

        assert await old.stop() == 0
        await works(scenario, new)

        rolled_back = await scenario.start(command=RUN_OLDER, **old_version)
        await works(scenario, new, rolled_back)
        assert await new.stop() == 0
        await works(scenario, rolled_back)
    assert await assert_invariants(scenario, rolled_back) == 0, "no event came twice"
    assert await rolled_back.stop() == 0


@pytest.mark.parametrize("revision", revisions())
async def test_a_worker_accepts_its_oldest_supported_schema_and_every_newer_one(empty_database_url, revision):
    engine = create_engine(empty_database_url, pool_size=1)
    await bring_to(engine, revision)
    if revisions().index(revision) >= revisions().index(OLDEST_SCHEMA):
        await probe(engine)
    else:
        with pytest.raises(UnavailableError, match=f"at {revision} and has no .*run closeout migrate"):
            await probe(engine)
    await engine.dispose()


async def test_a_worker_accepts_a_schema_of_an_unknown_newer_version(engine):
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE governance.schema_version SET version_num = '9999'"))
        await conn.execute(text("ALTER TABLE governance.incidents ADD COLUMN of_tomorrow text"))
    await probe(engine)


async def test_a_role_that_cannot_read_the_version_gets_the_missing_column(scenario_at_0001: Scenario):
    scenario = scenario_at_0001
    await scenario.sql(f"REVOKE ALL ON governance.schema_version FROM {scenario.role}")
    engine = create_engine(scenario.environ["DATABASE_URL"], pool_size=1)
    with pytest.raises(UnavailableError) as refused:
        await probe(engine)
    assert str(refused.value) == (
        "PostgreSQL has no governance.outbox_events.set_aside_until; "
        f"this worker needs {OLDEST_SCHEMA}: run closeout migrate"
    )
    await engine.dispose()


async def _says(worker: RunningWorker, words: str) -> bool:
    return words in str((await worker.state())["reason"])
