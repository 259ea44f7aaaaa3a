"""PostgreSQL goes away in every way it can, under load; no message is blamed, and work resumes by itself."""

import asyncio

import pytest

from tests.support.endurance import endure
from tests.support.fault_scenario import Running, Scene

pytestmark = pytest.mark.timeout(180)


async def test_a_kill_and_restart_of_postgresql_loses_nothing(scene: Scene, report):
    async with scene.worker() as worker:
        report(
            await endure(
                scene,
                worker,
                lambda: scene.aside(scene.postgres.kill),
                lambda: scene.aside(scene.postgres.start),
                pauses="PostgreSQL",
            )
        )


async def test_a_suspended_postgresql_pauses_the_worker_until_it_resumes(scene: Scene, report):
    async with scene.worker() as worker:
        report(
            await endure(
                scene,
                worker,
                lambda: scene.aside(scene.postgres.suspend),
                lambda: scene.aside(scene.postgres.resume),
                pauses=None,
                lasting=8,
            )
        )


async def test_a_stalled_postgresql_connection_pauses_the_worker(scene: Scene, report):
    async def heal() -> None:
        scene.database_line.flow()

    async def strike() -> None:
        scene.database_line.stall()

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="PostgreSQL", pause_within=40))


async def test_dead_postgresql_connections_are_replaced_by_new_ones(scene: Scene, report):
    """A failover behind one address: packets of the old sessions vanish, and nobody resets them."""

    async def strike() -> None:
        scene.database_line.stall(new_lines_too=False)

    async def heal() -> None:
        """The database is there all the time."""

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses=None, commit_within=30))


async def test_a_refused_postgresql_connection_pauses_the_worker(scene: Scene, report):
    async def strike() -> None:
        scene.database_line.refuse()
        scene.database_line.cut()

    async with scene.worker(in_process=True) as worker:
        report(await endure(scene, worker, strike, scene.database_line.accept, pauses="PostgreSQL"))


async def test_readyz_names_the_unavailable_server_and_no_further_run_is_started(scene: Scene):
    async with scene.worker() as worker:
        await scene.publish(20)
        await scene.all_closed_out()
        async with scene.load():
            scene.database_line.refuse()
            scene.database_line.cut()

            async def given_up() -> bool:
                return await worker.metric('closeout_deliveries_total{result="requeued"}') > 0

            await scene.until(given_up, within=15, what="the first batch that is given back")
            told = await scene.until(lambda: _paused(worker), within=15, what="a pause")
            first_words = (await worker.state())["reason"]
            await scene.database_line.accept()
        await scene.settle_books(worker)
    assert told < 3, f"/readyz said so {told:.1f} s after the first batch was given up"
    assert "PostgreSQL" in first_words


async def test_repeated_postgresql_disconnects_lose_nothing(scene: Scene, report):
    async def strike() -> None:
        for _ in range(15):
            scene.database_line.cut()
            await asyncio.sleep(0.2)

    async def heal() -> None:
        """Cut lines are made anew by the worker."""

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses=None))


async def test_a_read_only_database_pauses_the_worker_until_it_is_writable(scene: Scene, report):
    async def strike() -> None:
        await scene.sql("ALTER SYSTEM SET default_transaction_read_only = on")
        await scene.sql("SELECT pg_reload_conf()")

    async def heal() -> None:
        await scene.sql("ALTER SYSTEM RESET default_transaction_read_only")
        await scene.sql("SELECT pg_reload_conf()")

    async with scene.worker() as worker:
        try:
            report(await endure(scene, worker, strike, heal, pauses="read-only"))
        finally:
            await heal()


async def test_a_connection_limit_pauses_the_worker_until_connections_are_free(scene: Scene, report):
    async def strike() -> None:
        await scene.sql(f"ALTER ROLE {scene.role} CONNECTION LIMIT 0")
        await scene.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{scene.role}'")

    async def heal() -> None:
        await scene.sql(f"ALTER ROLE {scene.role} CONNECTION LIMIT -1")

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="too many connections"))


async def test_a_revoked_table_privilege_pauses_the_worker_until_it_is_granted(scene: Scene, report):
    async def strike() -> None:
        await scene.sql(f"REVOKE INSERT ON governance.incidents FROM {scene.role}")

    async def heal() -> None:
        await scene.sql(f"GRANT INSERT ON governance.incidents TO {scene.role}")

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="missing privileges: INSERT on incidents"))


async def test_a_table_lock_longer_than_the_lock_timeout_loses_nothing(scene: Scene, report):
    locker = None

    async def strike() -> None:
        nonlocal locker
        locker = asyncio.create_task(
            scene.sql("LOCK TABLE governance.incidents IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(8)")
        )

    async def heal() -> None:
        assert locker is not None
        await locker

    async with scene.worker(in_process=True) as worker:
        report(await endure(scene, worker, strike, heal, pauses=None))
        assert await worker.metric('closeout_deliveries_total{result="requeued"}') == 0, "it is over before an outage"


async def _paused(worker: Running) -> bool:
    return not await worker.ready()
