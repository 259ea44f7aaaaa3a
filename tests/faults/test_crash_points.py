"""SIGKILL at every step of a message; a second worker finds the state that tests/README.md lists.

The worker is held at each point by a lock, or by a trigger that waits for one, until it is dead.
"""

import contextlib
from collections.abc import Awaitable, Callable

import pytest

from consumer import create_transaction_coordinator
from consumer.contract.run_message import decode
from consumer.outbox.backlog import RELAYED_SECONDS
from consumer.postgres.engine import create_engine
from tests.support import run_messages as runs
from tests.support.faults.database_locks import hold_in_trigger, lock_table, ports_waiting_for_locks, waits_for_lock
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(120)

RUNS = 3
# Seconds beyond the relay's own delay; a busy machine must not exceed it.
LATE_SECONDS = 30.0
TABLES = ("run_completions", "incidents", "policy_evaluations", "traces", "outbox_events")
AFTER_THE_OUTBOX = "AFTER INSERT ON governance.outbox_events FOR EACH STATEMENT"
AT_COMMIT = "AFTER INSERT ON governance.incidents DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
BEFORE_THE_MARK = "BEFORE DELETE ON governance.outbox_events FOR EACH ROW"


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(lambda s: lock_table(s, "run_completions"), id="before-the-claim"),
        pytest.param(lambda s: lock_table(s, "incidents"), id="after-the-claim"),
        pytest.param(lambda s: lock_table(s, "policy_evaluations"), id="after-the-incident"),
        pytest.param(lambda s: lock_table(s, "traces"), id="after-the-evaluation"),
        pytest.param(lambda s: lock_table(s, "outbox_events"), id="after-the-trace"),
        pytest.param(lambda s: hold_in_trigger(s, AFTER_THE_OUTBOX), id="after-the-outbox"),
    ],
)
async def test_a_crash_before_the_commit_leaves_nothing_and_the_redelivery_is_new(
    scenario: Scenario, point: Callable[[Scenario], contextlib.AbstractAsyncContextManager[None]]
):
    first = await scenario.start()
    async with point(scenario):
        await scenario.publish(RUNS)
        await scenario.until(lambda: waits_for_lock(scenario), what="the point")
        await first.kill()
    await scenario.until(lambda: _no_session_left(scenario), what="the end of the dead worker's sessions")
    for table in TABLES:
        assert await scenario.count(table) == 0, table

    async with scenario.worker() as second:
        await _closes_out(scenario, second, committed=RUNS, duplicate=0)
        assert await assert_invariants(scenario, second) == 0
    assert await scenario.count("rollbacks") == 0


async def test_a_crash_during_the_commit_makes_the_redelivery_a_duplicate_and_publishes_its_events(scenario: Scenario):
    first = await scenario.start()
    async with hold_in_trigger(scenario, AT_COMMIT):
        await scenario.publish(RUNS)
        await scenario.until(lambda: waits_for_lock(scenario), what="the point")
        await first.kill()
        assert await scenario.count("run_completions") == 0
    # The server does not read from the connection before it has committed.
    await scenario.until(lambda: _no_session_left(scenario), what="the end of the dead worker's sessions")
    await _is_committed_and_unpublished(scenario)
    ids = await _ids_in_the_outbox(scenario)

    async with scenario.worker() as second:
        committed = await scenario.count("run_completions")
        # In one batch or in several: a run that the dead worker had not started is new to the second.
        await _closes_out(scenario, second, committed=RUNS - committed, duplicate=committed)
        scenario.must_be_published |= ids
        assert await assert_invariants(scenario, second) == 0


async def test_a_commit_with_a_lost_response_is_found_by_the_same_worker(scenario: Scenario):
    async with scenario.worker() as worker:
        async with hold_in_trigger(scenario, AT_COMMIT):
            await scenario.publish(1)
            await scenario.until(lambda: waits_for_lock(scenario), what="the point")
            ports = await ports_waiting_for_locks(scenario)
            doomed = [each for each in scenario.database_proxy.connections if each.port in ports]
            assert len(doomed) == 1
            doomed[0].drop_next_response = True
        await _closes_out(scenario, worker, committed=0, duplicate=1)
        assert await assert_invariants(scenario, worker) == 0
        assert await scenario.sql("SELECT phase_reached FROM governance.rollbacks") == "TRACE_COMPLETED"
        unconfirmed = [r for r in worker.records() if r["event"] == "rolled back"]
        assert [r["confirmed"] for r in unconfirmed] == [False], "the rollback must not be reported as confirmed"


async def test_a_commit_with_a_lost_response_is_found_by_the_next_worker_after_a_crash(scenario: Scenario):
    first = await scenario.start()
    async with hold_in_trigger(scenario, AT_COMMIT):
        await scenario.publish(1)
        await scenario.until(lambda: waits_for_lock(scenario), what="the point")
        scenario.database_proxy.stall()  # the COMMIT arrives, its response does not
    await scenario.until(lambda: _is(scenario.count("run_completions"), 1), what="the commit")
    await first.kill()
    scenario.database_proxy.cut()
    scenario.database_proxy.flow()
    await _is_committed_and_unpublished(scenario)
    ids = await _ids_in_the_outbox(scenario)

    async with scenario.worker() as second:
        await _closes_out(scenario, second, committed=0, duplicate=1)
        scenario.must_be_published |= ids
        assert await assert_invariants(scenario, second) == 0


async def test_a_crash_between_commit_and_publish_is_repaired_by_the_redelivery(scenario: Scenario):
    first = await scenario.start()
    async with lock_table(scenario, "run_completions"):
        await scenario.publish(RUNS)
        await scenario.until(lambda: waits_for_lock(scenario), what="the claim")
        scenario.broker_proxy.stall()
    await scenario.until(lambda: _some_are_committed(scenario), what="the commit")
    await _kill_on_a_stalled_connection(scenario, first)
    # A second batch may have been on its way to the disk: the server finishes it without its worker.
    await scenario.until(lambda: _no_session_left(scenario), what="the end of the dead worker's sessions")
    await _is_committed_and_unpublished(scenario)
    committed, ids = await scenario.count("run_completions"), await _ids_in_the_outbox(scenario)

    async with scenario.worker() as second:
        await _closes_out(scenario, second, committed=RUNS - committed, duplicate=committed)
        scenario.must_be_published |= ids
        assert await assert_invariants(scenario, second) == 0


async def test_a_crash_between_publish_and_mark_publishes_the_same_events_again(scenario: Scenario):
    first = await scenario.start()
    async with hold_in_trigger(scenario, BEFORE_THE_MARK):
        await scenario.publish(1)
        await scenario.until(lambda: waits_for_lock(scenario), what="the mark")
        await first.kill()
        # The server would finish the mark without the worker; the test is about a mark that never arrived.
        await scenario.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{scenario.role}'")
    await scenario.until(lambda: _no_session_left(scenario), what="the end of the dead worker's sessions")
    assert await scenario.phase_count("COMMITTED") == 1
    ids = await _ids_in_the_outbox(scenario)
    assert len(ids) == 3
    assert await scenario.length("subscriber") == 3, "the events were published"

    async with scenario.worker() as second:
        await _closes_out(scenario, second, committed=0, duplicate=1)
        scenario.must_be_published |= ids
        assert await assert_invariants(scenario, second) == 3, "published twice, with the same ids"


async def test_a_crash_between_mark_and_ack_makes_the_redelivery_a_no_op(scenario: Scenario):
    first = await scenario.start()
    async with hold_in_trigger(scenario, BEFORE_THE_MARK):
        await scenario.publish(1)
        await scenario.until(lambda: waits_for_lock(scenario), what="the mark")
        scenario.broker_proxy.stall()
    await scenario.until(lambda: _is(scenario.phase_count(), 1), what="the mark")
    assert await scenario.unacked() == 1, "not acked"
    await _kill_on_a_stalled_connection(scenario, first)
    rows = {table: await _rows(scenario, table) for table in TABLES}

    async with scenario.worker() as second:
        await _closes_out(scenario, second, committed=0, duplicate=1)
        assert await assert_invariants(scenario, second) == 0
    assert {table: await _rows(scenario, table) for table in TABLES} == rows


async def test_another_workers_relay_publishes_a_dead_workers_events_without_a_redelivery(scenario: Scenario, report):
    """Without a redelivery: the message was deleted by an operator, or expired."""
    engine = create_engine(scenario.postgres.url(scenario.database), pool_size=1)
    scenario.bodies = [runs.body() for _ in range(RUNS)]
    arrivals = [decode(body, max_bytes=1_000_000).run for body in scenario.bodies]
    await create_transaction_coordinator(engine=engine).execute_many(arrivals)
    await engine.dispose()
    scenario.must_be_published = await _ids_in_the_outbox(scenario)

    async with scenario.worker() as other:
        took = await scenario.all_closed_out()
        assert await assert_invariants(scenario, other) == 0
    report(f"published after {took:.1f} s")
    assert took <= RELAYED_SECONDS + LATE_SECONDS


async def _closes_out(scenario: Scenario, worker: RunningWorker, *, committed: int, duplicate: int) -> None:
    async def settled() -> bool:
        found = [await worker.metric(f'closeout_deliveries_total{{result="{r}"}}') for r in ("committed", "duplicate")]
        assert found[0] <= committed
        return found == [committed, duplicate]

    await scenario.until(settled, what=f"{committed} committed and {duplicate} duplicates")


async def _is_committed_and_unpublished(scenario: Scenario) -> None:
    committed = await scenario.count("run_completions")
    assert 0 < committed <= RUNS
    for table in TABLES[1:4]:
        assert await scenario.count(table) == committed, table
    assert await scenario.count("outbox_events") == 3 * committed
    assert await scenario.phase_count("COMMITTED") == committed
    assert await scenario.length("subscriber") == 0


async def _kill_on_a_stalled_connection(scenario: Scenario, worker: RunningWorker) -> None:
    await worker.kill()
    scenario.broker_proxy.cut()
    scenario.broker_proxy.flow()


async def _ids_in_the_outbox(scenario: Scenario) -> set[str]:
    return set((await scenario.sql("SELECT event_id FROM governance.outbox_events")).split())


async def _rows(scenario: Scenario, table: str) -> str:
    return await scenario.sql(f"SELECT t::text FROM governance.{table} t ORDER BY 1")


async def _no_session_left(scenario: Scenario) -> bool:
    return await scenario.sql(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{scenario.role}'") == "0"


async def _some_are_committed(scenario: Scenario) -> bool:
    return await scenario.count("run_completions") > 0


async def _is(found: Awaitable[int], expected: int) -> bool:
    return await found == expected
