"""Outages of PostgreSQL under load: no message is counted as failed, and work resumes by itself."""

import asyncio

import pytest

from tests.support.faults.endurance import endure
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(180)


async def test_a_kill_and_restart_of_postgresql_loses_nothing(scenario: Scenario, report):
    async with scenario.worker() as worker:
        report(
            await endure(
                scenario,
                worker,
                lambda: scenario.in_thread(scenario.postgres.kill),
                lambda: scenario.in_thread(scenario.postgres.start),
                pauses="PostgreSQL",
            )
        )


async def test_a_suspended_postgresql_pauses_the_worker_until_it_resumes(scenario: Scenario, report):
    async with scenario.worker() as worker:
        report(
            await endure(
                scenario,
                worker,
                lambda: scenario.in_thread(scenario.postgres.suspend),
                lambda: scenario.in_thread(scenario.postgres.resume),
                pauses=None,
                lasting=8,
            )
        )


async def test_a_stalled_postgresql_connection_pauses_the_worker(scenario: Scenario, report):
    async def recover() -> None:
        scenario.database_proxy.flow()

    async def inject() -> None:
        scenario.database_proxy.stall()

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses="PostgreSQL"))


async def test_dead_postgresql_connections_are_replaced_by_new_ones(scenario: Scenario, report):
    """A failover behind one address: packets of the old sessions are dropped without a reset."""

    async def inject() -> None:
        scenario.database_proxy.stall(new_connections_too=False)

    async def recover() -> None:
        """The database stays available."""

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses=None, commit_within=60))


async def test_a_refused_postgresql_connection_pauses_the_worker(scenario: Scenario, report):
    async def inject() -> None:
        scenario.database_proxy.refuse()
        scenario.database_proxy.cut()

    async with scenario.worker(in_process=True) as worker:
        report(await endure(scenario, worker, inject, scenario.database_proxy.accept, pauses="PostgreSQL"))


async def test_readyz_names_the_unavailable_server_and_no_further_run_is_started(scenario: Scenario):
    async with scenario.worker() as worker:
        await scenario.publish(20)
        await scenario.all_closed_out()
        async with scenario.load():
            scenario.database_proxy.refuse()
            scenario.database_proxy.cut()

            async def given_up() -> bool:
                return await worker.metric('closeout_deliveries_total{result="requeued"}') > 0

            await scenario.until(given_up, what="the first requeued batch")
            paused = await scenario.until(lambda: _paused(worker), what="a pause")
            reason = (await worker.state())["reason"]
            await scenario.database_proxy.accept()
        await assert_invariants(scenario, worker)
    assert paused < 15, f"/readyz reported it {paused:.1f} s after the first batch was requeued"
    assert "PostgreSQL" in reason


async def test_repeated_postgresql_disconnects_lose_nothing(scenario: Scenario, report):
    async def inject() -> None:
        for _ in range(15):
            scenario.database_proxy.cut()
            await asyncio.sleep(0.2)

    async def recover() -> None:
        """The worker reconnects."""

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses=None))


async def test_a_read_only_database_pauses_the_worker_until_it_is_writable(scenario: Scenario, report):
    async def inject() -> None:
        await scenario.sql("ALTER SYSTEM SET default_transaction_read_only = on")
        await scenario.sql("SELECT pg_reload_conf()")

    async def recover() -> None:
        await scenario.sql("ALTER SYSTEM RESET default_transaction_read_only")
        await scenario.sql("SELECT pg_reload_conf()")

    async with scenario.worker() as worker:
        try:
            report(await endure(scenario, worker, inject, recover, pauses="read-only"))
        finally:
            await recover()


async def test_a_connection_limit_pauses_the_worker_until_connections_are_free(scenario: Scenario, report):
    async def inject() -> None:
        await scenario.sql(f"ALTER ROLE {scenario.role} CONNECTION LIMIT 0")
        await scenario.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{scenario.role}'")

    async def recover() -> None:
        await scenario.sql(f"ALTER ROLE {scenario.role} CONNECTION LIMIT -1")

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses="too many connections"))


async def test_a_revoked_table_privilege_pauses_the_worker_until_it_is_granted(scenario: Scenario, report):
    async def inject() -> None:
        await scenario.sql(f"REVOKE INSERT ON governance.incidents FROM {scenario.role}")

    async def recover() -> None:
        await scenario.sql(f"GRANT INSERT ON governance.incidents TO {scenario.role}")

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses="missing privileges: INSERT on incidents"))


async def test_a_table_lock_longer_than_the_lock_timeout_loses_nothing(scenario: Scenario, report):
    locker = None

    async def inject() -> None:
        nonlocal locker
        locker = asyncio.create_task(
            scenario.sql("LOCK TABLE governance.incidents IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(8)")
        )

    async def recover() -> None:
        assert locker is not None
        await locker

    async with scenario.worker(in_process=True) as worker:
        report(await endure(scenario, worker, inject, recover, pauses=None))
        assert await worker.metric('closeout_deliveries_total{result="requeued"}') == 0, (
            "the lock ends before it counts as an outage"
        )


async def _paused(worker: RunningWorker) -> bool:
    return not await worker.ready()
