"""A PostgreSQL primary dies under load and its streaming standby takes over; the worker knows both by one URL."""

import pytest
from servers.postgres_standby import PostgresStandby

from consumer import TransactionFailed, create_transaction_coordinator
from consumer.errors import Fault, UnavailableError, fault_of
from consumer.postgres.engine import create_engine
from consumer.postgres.readiness import probe
from tests.support import run_messages as runs
from tests.support.endurance import endure
from tests.support.fault_scenario import Scene

pytestmark = pytest.mark.timeout(120)


async def test_a_standby_takes_over_from_a_primary_that_dies_under_load(scene: Scene, report, tmp_path):
    primary = scene.postgres
    standby = PostgresStandby(tmp_path / "standby", primary)

    async def strike() -> None:
        await scene.aside(primary.kill)
        scene.postgres = standby

    async def heal() -> None:
        await scene.aside(standby.promote)

    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    url = f"postgresql://{scene.role}@{hosts}/{scene.database}?target_session_attrs=read-write"
    await scene.aside(standby.start)
    try:
        await scene.aside(standby.follow)
        async with scene.worker(DATABASE_URL=url) as worker:
            # Long enough that attempts, if they were counted, would run out.
            report(await endure(scene, worker, strike, heal, pauses="PostgreSQL", lasting=20))
            assert await scene.sql("SELECT pg_is_in_recovery()") == "f"
    finally:
        if not primary.running:
            await scene.aside(primary.start)
        # It would wait for its standby for ever.
        await scene.aside(primary.psql, "ALTER SYSTEM RESET synchronous_standby_names")
        await scene.aside(primary.psql, "SELECT pg_reload_conf()")
        await scene.aside(standby.kill)
        scene.postgres = primary


async def test_a_url_without_a_primary_is_a_transient_error(scene: Scene, tmp_path):
    with PostgresStandby(tmp_path / "standby", scene.postgres) as standby:
        engine = create_engine(f"{standby.url(scene.database)}?target_session_attrs=read-write")
        coordinator = create_transaction_coordinator(engine=engine)

        with pytest.raises(UnavailableError, match="PostgreSQL"):
            await probe(engine)
        with pytest.raises(TransactionFailed) as failure:
            await coordinator.execute(runs.run())

        assert fault_of(failure.value) is Fault.TRANSIENT
