"""A PostgreSQL primary dies under load and its streaming standby takes over; one URL names both."""

import pytest
from servers.clusters.postgres_standby import PostgresStandby

from consumer import TransactionFailed, create_transaction_coordinator
from consumer.errors import Fault, UnavailableError, fault_of
from consumer.postgres.engine import create_engine
from consumer.postgres.readiness import probe
from tests.support import run_messages as runs
from tests.support.faults.endurance import endure
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(120)


async def test_a_standby_takes_over_from_a_primary_that_dies_under_load(scenario: Scenario, report, tmp_path):
    primary = scenario.postgres
    standby = PostgresStandby(tmp_path / "standby", primary)

    async def inject() -> None:
        await scenario.in_thread(primary.kill)
        scenario.postgres = standby

    async def recover() -> None:
        await scenario.in_thread(standby.promote)

    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    url = f"postgresql://{scenario.role}@{hosts}/{scenario.database}?target_session_attrs=read-write"
    await scenario.in_thread(standby.start)
    try:
        await scenario.in_thread(standby.follow)
        async with scenario.worker(DATABASE_URL=url) as worker:
            # Long enough for counted attempts to be exhausted.
            report(await endure(scenario, worker, inject, recover, pauses="PostgreSQL", lasting=20))
            assert await scenario.sql("SELECT pg_is_in_recovery()") == "f"
    finally:
        if not primary.running:
            await scenario.in_thread(primary.start)
        # Otherwise it waits for its standby.
        await scenario.in_thread(primary.psql, "ALTER SYSTEM RESET synchronous_standby_names")
        await scenario.in_thread(primary.psql, "SELECT pg_reload_conf()")
        await scenario.in_thread(standby.kill)
        scenario.postgres = primary


async def test_a_url_without_a_primary_is_a_transient_error(scenario: Scenario, tmp_path):
    with PostgresStandby(tmp_path / "standby", scenario.postgres) as standby:
        engine = create_engine(f"{standby.url(scenario.database)}?target_session_attrs=read-write")
        coordinator = create_transaction_coordinator(engine=engine)

        with pytest.raises(UnavailableError, match="PostgreSQL"):
            await probe(engine)
        with pytest.raises(TransactionFailed) as failure:
            await coordinator.execute(runs.run())

        assert fault_of(failure.value) is Fault.TRANSIENT
