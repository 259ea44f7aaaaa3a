"""A worker dies at every point of a message's way, by SIGKILL; a second worker finds what tests/README.md says.

It is held at each point by a lock, or by a trigger that waits for one, until it is dead.
"""

import contextlib
from collections.abc import Awaitable, Callable

import pytest

from consumer import create_transaction_coordinator
from consumer.contract.run_message import decode
from consumer.postgres.engine import create_engine
from tests.support import run_messages as runs
from tests.support.database_locks import table_locked, trigger_held, waiting, waiting_ports
from tests.support.fault_scenario import Running, Scene

pytestmark = pytest.mark.timeout(60)

RUNS = 3
TABLES = ("run_completions", "incidents", "policy_evaluations", "traces", "outbox_events")
AFTER_THE_OUTBOX = "AFTER INSERT ON governance.outbox_events FOR EACH STATEMENT"
AT_COMMIT = "AFTER INSERT ON governance.incidents DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
BEFORE_THE_MARK = "BEFORE DELETE ON governance.outbox_events FOR EACH ROW"


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(lambda s: table_locked(s, "run_completions"), id="before-the-claim"),
        pytest.param(lambda s: table_locked(s, "incidents"), id="after-the-claim"),
        pytest.param(lambda s: table_locked(s, "policy_evaluations"), id="after-the-incident"),
        pytest.param(lambda s: table_locked(s, "traces"), id="after-the-evaluation"),
        pytest.param(lambda s: table_locked(s, "outbox_events"), id="after-the-trace"),
        pytest.param(lambda s: trigger_held(s, AFTER_THE_OUTBOX), id="after-the-outbox"),
    ],
)
async def test_a_crash_before_the_commit_leaves_nothing_and_the_redelivery_is_new(
    scene: Scene, point: Callable[[Scene], contextlib.AbstractAsyncContextManager[None]]
):
    first = await scene.start()
    async with point(scene):
        await scene.publish(RUNS)
        await scene.until(lambda: waiting(scene), within=20, what="the point")
        await first.kill()
    await scene.until(lambda: _no_session_left(scene), within=20, what="the end of the dead worker's sessions")
    for table in TABLES:
        assert await scene.count(table) == 0, table

    async with scene.worker() as second:
        await _closes_out(scene, second, committed=RUNS, duplicate=0)
        assert await scene.settle_books(second) == 0
    assert await scene.count("rollbacks") == 0


async def test_a_crash_during_the_commit_makes_the_redelivery_a_duplicate_and_publishes_its_events(scene: Scene):
    first = await scene.start()
    async with trigger_held(scene, AT_COMMIT):
        await scene.publish(RUNS)
        await scene.until(lambda: waiting(scene), within=20, what="the point")
        await first.kill()
        assert await scene.count("run_completions") == 0
    # The server does not look at the line before it has committed.
    await scene.until(lambda: _no_session_left(scene), within=20, what="the end of the dead worker's sessions")
    await _is_committed_and_not_told(scene)
    ids = await _ids_in_the_outbox(scene)

    async with scene.worker() as second:
        committed = await scene.count("run_completions")
        # Held one by one, or together: what the dead worker had not begun is new to the second.
        await _closes_out(scene, second, committed=RUNS - committed, duplicate=committed)
        scene.must_be_told |= ids
        assert await scene.settle_books(second) == 0


async def test_a_commit_with_a_lost_response_is_found_by_the_same_worker(scene: Scene):
    async with scene.worker() as worker:
        async with trigger_held(scene, AT_COMMIT):
            await scene.publish(1)
            await scene.until(lambda: waiting(scene), within=20, what="the point")
            ports = await waiting_ports(scene)
            doomed = [line for line in scene.database_line.lines if line.port in ports]
            assert len(doomed) == 1
            doomed[0].doomed = True
        await _closes_out(scene, worker, committed=0, duplicate=1)
        assert await scene.settle_books(worker) == 0
        assert await scene.sql("SELECT phase_reached FROM governance.rollbacks") == "TRACE_COMPLETED"
        unconfirmed = [r for r in worker.records() if r["event"] == "rolled back"]
        assert [r["confirmed"] for r in unconfirmed] == [False], "nobody may claim that it was rolled back"


async def test_a_commit_with_a_lost_response_is_found_by_the_next_worker_after_a_crash(scene: Scene):
    first = await scene.start()
    async with trigger_held(scene, AT_COMMIT):
        await scene.publish(1)
        await scene.until(lambda: waiting(scene), within=20, what="the point")
        scene.database_line.stall()  # the COMMIT is through, its answer is not
    await scene.until(lambda: _is(scene.count("run_completions"), 1), within=20, what="the commit")
    await first.kill()
    scene.database_line.cut()
    scene.database_line.flow()
    await _is_committed_and_not_told(scene)
    ids = await _ids_in_the_outbox(scene)

    async with scene.worker() as second:
        await _closes_out(scene, second, committed=0, duplicate=1)
        scene.must_be_told |= ids
        assert await scene.settle_books(second) == 0


async def test_a_crash_between_commit_and_publish_is_repaired_by_the_redelivery(scene: Scene):
    first = await scene.start()
    async with table_locked(scene, "run_completions"):
        await scene.publish(RUNS)
        await scene.until(lambda: waiting(scene), within=20, what="the claim")
        scene.broker_line.stall()
    await scene.until(lambda: _some_are_committed(scene), within=20, what="the commit")
    await _dies_on_a_stalled_line(scene, first)
    # A second batch may have been on its way to the disk: the server finishes it without its worker.
    await scene.until(lambda: _no_session_left(scene), within=20, what="the end of the dead worker's sessions")
    await _is_committed_and_not_told(scene)
    committed, ids = await scene.count("run_completions"), await _ids_in_the_outbox(scene)

    async with scene.worker() as second:
        await _closes_out(scene, second, committed=RUNS - committed, duplicate=committed)
        scene.must_be_told |= ids
        assert await scene.settle_books(second) == 0


async def test_a_crash_between_publish_and_mark_publishes_the_same_events_again(scene: Scene):
    first = await scene.start()
    async with trigger_held(scene, BEFORE_THE_MARK):
        await scene.publish(1)
        await scene.until(lambda: waiting(scene), within=20, what="the mark")
        await first.kill()
        # The mark has reached the server, which would finish it without its worker: here it is as if it never had.
        await scene.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{scene.role}'")
    await scene.until(lambda: _no_session_left(scene), within=20, what="the end of the dead worker's sessions")
    assert await scene.phase_count("COMMITTED") == 1
    ids = await _ids_in_the_outbox(scene)
    assert len(ids) == 3
    assert await scene.length("subscriber") == 3, "they were out"

    async with scene.worker() as second:
        await _closes_out(scene, second, committed=0, duplicate=1)
        scene.must_be_told |= ids
        assert await scene.settle_books(second) == 3, "published twice, under the same ids"


async def test_a_crash_between_mark_and_ack_makes_the_redelivery_a_no_op(scene: Scene):
    first = await scene.start()
    async with trigger_held(scene, BEFORE_THE_MARK):
        await scene.publish(1)
        await scene.until(lambda: waiting(scene), within=20, what="the mark")
        scene.broker_line.stall()
    await scene.until(lambda: _is(scene.phase_count(), 1), within=20, what="the mark")
    assert await scene.held() == 1, "not acked"
    await _dies_on_a_stalled_line(scene, first)
    rows = {table: await _rows(scene, table) for table in TABLES}

    async with scene.worker() as second:
        await _closes_out(scene, second, committed=0, duplicate=1)
        assert await scene.settle_books(second) == 0
    assert {table: await _rows(scene, table) for table in TABLES} == rows


async def test_another_workers_relay_publishes_a_dead_workers_events_without_a_redelivery(scene: Scene, report):
    """With no delivery to remind anybody: it was taken by an operator, say, or expired."""
    engine = create_engine(scene.postgres.url(scene.database), pool_size=1)
    scene.bodies = [runs.body() for _ in range(RUNS)]
    arrivals = [decode(body, max_bytes=1_000_000).run for body in scene.bodies]
    await create_transaction_coordinator(engine=engine).execute_many(arrivals)
    await engine.dispose()
    scene.must_be_told = await _ids_in_the_outbox(scene)

    async with scene.worker() as other:
        took = await scene.all_closed_out(within=30)
        assert await scene.settle_books(other) == 0
    report(f"told after {took:.1f} s")
    assert took <= 15


async def _closes_out(scene: Scene, worker: Running, *, committed: int, duplicate: int) -> None:
    async def settled() -> bool:
        found = [await worker.metric(f'closeout_deliveries_total{{result="{r}"}}') for r in ("committed", "duplicate")]
        assert found[0] <= committed
        return found == [committed, duplicate]

    await scene.until(settled, within=15, what=f"{committed} committed and {duplicate} duplicates")


async def _is_committed_and_not_told(scene: Scene) -> None:
    committed = await scene.count("run_completions")
    assert 0 < committed <= RUNS
    for table in TABLES[1:4]:
        assert await scene.count(table) == committed, table
    assert await scene.count("outbox_events") == 3 * committed
    assert await scene.phase_count("COMMITTED") == committed
    assert await scene.length("subscriber") == 0


async def _dies_on_a_stalled_line(scene: Scene, worker: Running) -> None:
    await worker.kill()
    scene.broker_line.cut()
    scene.broker_line.flow()


async def _ids_in_the_outbox(scene: Scene) -> set[str]:
    return set((await scene.sql("SELECT event_id FROM governance.outbox_events")).split())


async def _rows(scene: Scene, table: str) -> str:
    return await scene.sql(f"SELECT t::text FROM governance.{table} t ORDER BY 1")


async def _no_session_left(scene: Scene) -> bool:
    return await scene.sql(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{scene.role}'") == "0"


async def _some_are_committed(scene: Scene) -> bool:
    return await scene.count("run_completions") > 0


async def _is(found: Awaitable[int], expected: int) -> bool:
    return await found == expected
