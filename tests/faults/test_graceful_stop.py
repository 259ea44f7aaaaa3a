"""SIGTERM under load: nothing is lost, little is redelivered, and the grace period is kept whatever hangs."""

import asyncio
import signal
from time import monotonic

import pytest

from consumer.contract.names import RUN_COMPLETED_QUEUE
from tests.support import run_messages as runs
from tests.support.faults.database_locks import lock_table, waits_for_lock
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.timeout(180)

LOAD = 600
# Seconds from the end of the grace period until the end of a process is detected; a busy machine must not exceed it.
LATE = 15.0
# Log event of a worker whose grace period ended before its work.
NOT_DRAINED = "not drained in time"


async def test_stopping_under_load_loses_no_run_and_redelivers_no_committed_run(scenario: Scenario, report):
    await scenario.publish(LOAD)
    worker = await scenario.start()
    await scenario.until(lambda: _at_least(scenario, 100), what="some work")
    started = monotonic()
    assert await worker.stop() == 0
    took = monotonic() - started
    done = set((await scenario.sql("SELECT run_id FROM governance.run_completions")).split())
    left, redelivered = await _main_queue(scenario)
    assert done | left == {str(runs.run_id_of(body)) for body in scenario.bodies}
    assert done & left == set(), "every committed run was acked"
    assert await scenario.count("outbox_events") == 0, "every event was published"
    report(f"{took:.1f} s; {len(done)} done, {len(left)} left, {redelivered} of them flagged as redelivered")
    assert not _logged(worker, NOT_DRAINED)
    assert redelivered <= 200, "at most the prefetch count"
    assert worker.records()[-1]["event"] == "stopped"

    async with scenario.worker() as second:
        assert await assert_invariants(scenario, second) == 0
        assert await second.metric('closeout_deliveries_total{result="duplicate"}') == 0


async def test_a_rolling_replacement_of_workers_under_load_loses_nothing(scenario: Scenario, report):
    """A rolling deployment without pauses."""
    async with scenario.load(pause=0.005):
        workers = [await scenario.start()]
        for _ in range(4):
            workers.append(await scenario.start())
            assert await workers[-2].stop() == 0
    await scenario.all_closed_out()
    duplicates = await workers[-1].metric('closeout_deliveries_total{result="duplicate"}')
    again = await assert_invariants(scenario, workers[-1])
    assert await workers[-1].stop() == 0
    report(
        f"{len(scenario.bodies)} runs by five workers, {duplicates:.0f} duplicates at the last, {again} events repeated"
    )
    assert (duplicates, again) == (0, 0)


async def test_a_hanging_transaction_does_not_outlast_the_grace_period(scenario: Scenario, report):
    worker = await scenario.start(SHUTDOWN_GRACE_SECONDS="4")
    async with lock_table(scenario, "incidents"):
        await scenario.publish(5)
        await scenario.until(lambda: waits_for_lock(scenario), what="a transaction that hangs")
        started = monotonic()
        status = await worker.stop()
        took = monotonic() - started
        assert await scenario.count("run_completions") == 0
    report(f"ended after {took:.1f} s of 4, exit {status}")
    assert status == 0
    assert took <= 4 + LATE
    assert _logged(worker, NOT_DRAINED)
    async with scenario.worker() as second:
        assert await assert_invariants(scenario, second) == 0


@pytest.mark.parametrize("stalled", ["database", "broker", "both"])
async def test_a_stalled_connection_does_not_outlast_the_grace_period(scenario: Scenario, report, stalled: str):
    worker = await scenario.start(SHUTDOWN_GRACE_SECONDS="6")
    proxies = {"database": [scenario.database_proxy], "broker": [scenario.broker_proxy]}
    stalled_proxies = proxies.get(stalled) or [scenario.database_proxy, scenario.broker_proxy]
    async with lock_table(scenario, "run_completions"):
        await scenario.publish(5)
        await scenario.until(lambda: waits_for_lock(scenario), what="a transaction")
        for each in stalled_proxies:
            each.stall()
    started = monotonic()
    status = await worker.stop()
    took = monotonic() - started
    for each in stalled_proxies:
        each.cut()
        each.flow()
    report(f"ended after {took:.1f} s of 6, exit {status}")
    async with scenario.worker() as second:
        await assert_invariants(scenario, second)
    assert status == 0
    assert took <= 6 + LATE
    assert _logged(worker, NOT_DRAINED)


async def test_a_second_signal_ends_the_worker_immediately(scenario: Scenario):
    worker = await scenario.start()
    assert worker.process is not None
    async with lock_table(scenario, "incidents"):
        await scenario.publish(5)
        await scenario.until(lambda: waits_for_lock(scenario), what="a transaction that hangs")
        worker.process.send_signal(signal.SIGTERM)
        await scenario.until(lambda: _has_logged(worker, "draining"), what="draining")
        worker.process.send_signal(signal.SIGTERM)
        # By the signal itself, where the end of the transaction would exit with 0.
        assert await asyncio.wait_for(worker.process.wait(), PATIENCE) == -signal.SIGTERM
    async with scenario.worker() as second:
        assert await assert_invariants(scenario, second) == 0


@pytest.mark.parametrize("away", ["postgres", "rabbit"])
async def test_a_worker_stops_promptly_while_a_server_is_unavailable(scenario: Scenario, report, away: str):
    proxy = scenario.database_proxy if away == "postgres" else scenario.broker_proxy
    worker = await scenario.start()
    await scenario.until(worker.ready, what="readiness")
    proxy.refuse()
    proxy.cut()
    await scenario.publish(1)
    await scenario.until(lambda: _not_ready(worker), what="a pause")
    started = monotonic()
    assert await worker.stop() == 0
    report(f"ended after {monotonic() - started:.1f} s")
    assert not _logged(worker, NOT_DRAINED)
    await proxy.accept()
    async with scenario.worker() as second:
        await assert_invariants(scenario, second)


async def _main_queue(scenario: Scenario) -> tuple[set[str], int]:
    """Read the main queue and requeue it; return its runs, and how many are flagged as redelivered."""
    await scenario.until(lambda: _nothing_held(scenario), what="the return of all deliveries")
    channel = await scenario.broker.channel(confirms=False)
    found, redelivered = set(), 0
    while (message := await channel.basic_get(RUN_COMPLETED_QUEUE)).delivery_tag is not None:
        found.add(str(runs.run_id_of(message.body)))
        redelivered += bool(message.redelivered)
    await channel.close()
    await scenario.until(lambda: _nothing_held(scenario), what="the return of the read messages")
    return found, redelivered


async def _nothing_held(scenario: Scenario) -> bool:
    return await scenario.unacked() == 0


async def _at_least(scenario: Scenario, number: int) -> bool:
    return await scenario.count("run_completions") >= number


def _logged(worker: RunningWorker, event: str) -> bool:
    return any(record["event"].startswith(event) for record in worker.records())


async def _has_logged(worker: RunningWorker, event: str) -> bool:
    return _logged(worker, event)


async def _not_ready(worker: RunningWorker) -> bool:
    return not await worker.ready()
