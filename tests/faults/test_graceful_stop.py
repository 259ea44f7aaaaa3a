"""SIGTERM under load: nothing is lost, little is delivered again, the grace period is kept whatever hangs."""

import asyncio
import signal
from time import monotonic

import pytest

from consumer.contract.names import RUN_COMPLETED_QUEUE
from tests.support import run_messages as runs
from tests.support.database_locks import table_locked, waiting
from tests.support.fault_scenario import Running, Scene

pytestmark = pytest.mark.timeout(90)

LOAD = 600
# Batches of 50, two at once: what may be in work, and so come again, when a worker ends in the worst way.
IN_WORK = 100
# Seconds: how late a process may be seen to have ended on a machine that is busy with other things.
LATE = 2.0


async def test_stopping_under_load_loses_no_run_and_redelivers_no_committed_run(scene: Scene, report):
    await scene.publish(LOAD)
    worker = await scene.start()
    await scene.until(lambda: _at_least(scene, 100), within=20, what="some work")
    began = monotonic()
    assert await worker.stop(within=27) == 0
    took = monotonic() - began
    done = set((await scene.sql("SELECT run_id FROM governance.run_completions")).split())
    left, redelivered = await _look(scene)
    assert done | left == {str(runs.run_id_of(body)) for body in scene.bodies}
    assert done & left == set(), "what was committed was acked"
    assert await scene.count("outbox_events") == 0, "and told"
    report(f"{took:.1f} s; {len(done)} done, {len(left)} left, {redelivered} of them flagged as redelivered")
    assert took < 5
    assert redelivered <= 200, "no more than the prefetch"
    assert worker.records()[-1]["event"] == "stopped"

    async with scene.worker() as second:
        assert await scene.settle_books(second) == 0
        assert await second.metric('closeout_deliveries_total{result="duplicate"}') == 0


async def test_a_rolling_replacement_of_workers_under_load_loses_nothing(scene: Scene, report):
    """A rolling deployment, too fast."""
    async with scene.load(pause=0.005):
        workers = [await scene.start()]
        for _ in range(4):
            workers.append(await scene.start())
            assert await workers[-2].stop(within=20) == 0
    await scene.all_closed_out()
    duplicates = await workers[-1].metric('closeout_deliveries_total{result="duplicate"}')
    again = await scene.settle_books(workers[-1])
    assert await workers[-1].stop() == 0
    report(
        f"{len(scene.bodies)} runs by five workers, {duplicates:.0f} duplicates at the last, {again} events repeated"
    )
    assert (duplicates, again) == (0, 0)


async def test_a_hanging_transaction_does_not_outlast_the_grace_period(scene: Scene, report):
    worker = await scene.start(SHUTDOWN_GRACE_SECONDS="4")
    async with table_locked(scene, "incidents"):
        await scene.publish(5)
        await scene.until(lambda: waiting(scene), within=20, what="a transaction that hangs")
        began = monotonic()
        status = await worker.stop(within=15)
        took = monotonic() - began
        assert await scene.count("run_completions") == 0
    report(f"ended after {took:.1f} s of 4, exit {status}")
    assert status == 0
    assert took <= 4 + LATE
    async with scene.worker() as second:
        assert await scene.settle_books(second) == 0


@pytest.mark.parametrize("line", ["database", "broker", "both"])
async def test_a_stalled_connection_does_not_outlast_the_grace_period(scene: Scene, report, line: str):
    worker = await scene.start(SHUTDOWN_GRACE_SECONDS="6")
    stalled = {"database": [scene.database_line], "broker": [scene.broker_line]}
    lines = stalled.get(line) or [scene.database_line, scene.broker_line]
    async with table_locked(scene, "run_completions"):
        await scene.publish(5)
        await scene.until(lambda: waiting(scene), within=20, what="a transaction")
        for each in lines:
            each.stall()
    began = monotonic()
    status = await worker.stop(within=30)
    took = monotonic() - began
    for each in lines:
        each.cut()
        each.flow()
    report(f"ended after {took:.1f} s of 6, exit {status}")
    async with scene.worker() as second:
        await scene.settle_books(second)
    assert status == 0
    assert took <= 6 + LATE


async def test_a_second_signal_ends_the_worker_immediately(scene: Scene):
    worker = await scene.start()
    assert worker.process is not None
    async with table_locked(scene, "incidents"):
        await scene.publish(5)
        await scene.until(lambda: waiting(scene), within=20, what="a transaction that hangs")
        worker.process.send_signal(signal.SIGTERM)
        await scene.until(lambda: _says(worker, "draining"), within=5, what="draining")
        began = monotonic()
        worker.process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(worker.process.wait(), 20)
        assert monotonic() - began < LATE  # the lock alone would hold it for 5 s
        assert status == -signal.SIGTERM
    async with scene.worker() as second:
        assert await scene.settle_books(second) == 0


@pytest.mark.parametrize("away", ["postgres", "rabbit"])
async def test_a_worker_stops_promptly_while_a_server_is_unavailable(scene: Scene, report, away: str):
    line = scene.database_line if away == "postgres" else scene.broker_line
    worker = await scene.start()
    await scene.until(worker.ready, within=20, what="readiness")
    line.refuse()
    line.cut()
    await scene.publish(1)
    await scene.until(lambda: _not_ready(worker), within=20, what="a pause")
    began = monotonic()
    assert await worker.stop(within=30) == 0
    took = monotonic() - began
    report(f"ended after {took:.1f} s")
    assert took < 5
    await line.accept()
    async with scene.worker() as second:
        await scene.settle_books(second)


async def _look(scene: Scene) -> tuple[set[str], int]:
    """Look at what is in the main queue, and give it back: the runs, and how many are flagged as redelivered."""
    await scene.until(lambda: _nothing_held(scene), within=20, what="the return of all deliveries")
    channel = await scene.broker.channel(confirms=False)
    found, redelivered = set(), 0
    while (message := await channel.basic_get(RUN_COMPLETED_QUEUE)).delivery_tag is not None:
        found.add(str(runs.run_id_of(message.body)))
        redelivered += bool(message.redelivered)
    await channel.close()
    await scene.until(lambda: _nothing_held(scene), within=20, what="the return of what was looked at")
    return found, redelivered


async def _nothing_held(scene: Scene) -> bool:
    return await scene.held() == 0


async def _at_least(scene: Scene, number: int) -> bool:
    return await scene.count("run_completions") >= number


async def _says(worker: Running, event: str) -> bool:
    return any(record["event"] == event for record in worker.records())


async def _not_ready(worker: Running) -> bool:
    return not await worker.ready()
