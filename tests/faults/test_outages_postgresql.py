"""PostgreSQL goes away in every way it can, under load; no message is blamed, and work resumes by itself."""

import asyncio

import pytest

from tests.support.endurance import endure
from tests.support.fault_scenario import Running, Scene

pytestmark = pytest.mark.timeout(180)


async def test_postgresql_killed_and_restarted(scene: Scene, report):
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


async def test_postgresql_suspended_and_resumed(scene: Scene, report):
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


async def test_the_line_to_postgresql_stalled(scene: Scene, report):
    async def heal() -> None:
        scene.database_line.flow()

    async def strike() -> None:
        scene.database_line.stall()

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="PostgreSQL", pause_within=40))


async def test_old_lines_to_postgresql_lead_nowhere_and_new_ones_work(scene: Scene, report):
    """A failover behind one address: packets of the old sessions vanish, and nobody resets them."""

    async def strike() -> None:
        scene.database_line.stall(new_lines_too=False)

    async def heal() -> None:
        """The database is there all the time."""

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses=None, commit_within=30))


async def test_the_line_to_postgresql_cut_and_refused(scene: Scene, report):
    async def strike() -> None:
        scene.database_line.refuse()
        scene.database_line.cut()

    async with scene.worker(in_process=True) as worker:
        report(await endure(scene, worker, strike, scene.database_line.accept, pauses="PostgreSQL"))


async def test_readyz_says_which_server_as_soon_as_it_counts_as_an_outage_and_nothing_more_is_begun(scene: Scene):
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


async def test_the_line_to_postgresql_cut_again_and_again(scene: Scene, report):
    async def strike() -> None:
        for _ in range(15):
            scene.database_line.cut()
            await asyncio.sleep(0.2)

    async def heal() -> None:
        """Cut lines are made anew by the worker."""

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses=None))


async def test_a_database_that_is_read_only_for_a_time(scene: Scene, report):
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


async def test_too_many_connections(scene: Scene, report):
    async def strike() -> None:
        await scene.sql(f"ALTER ROLE {scene.role} CONNECTION LIMIT 0")
        await scene.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{scene.role}'")

    async def heal() -> None:
        await scene.sql(f"ALTER ROLE {scene.role} CONNECTION LIMIT -1")

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="too many connections"))


async def test_rights_on_a_table_revoked_and_granted(scene: Scene, report):
    async def strike() -> None:
        await scene.sql(f"REVOKE INSERT ON governance.incidents FROM {scene.role}")

    async def heal() -> None:
        await scene.sql(f"GRANT INSERT ON governance.incidents TO {scene.role}")

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="missing privileges: INSERT on incidents"))


async def test_a_lock_held_on_a_table_for_eight_seconds(scene: Scene, report):
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
