"""The course of every outage test: inject the fault, watch the worker, recover, measure, assert the invariants."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.waiting import PATIENCE

# Seconds from a server's return to the worker's next commit: one or two as a rule. A busy machine must not exceed it.
RESUME_SECONDS = 30.0
# Seconds of a pause that are watched for a busy loop, with the share of a CPU and the log lines allowed in them.
WATCH_SECONDS = 3.0
LOG_LINES_PER_SECOND = 4.0
CPU_SHARE = 0.25

Act = Callable[[], Awaitable[object]]


async def endure(
    scenario: Scenario,
    worker: RunningWorker,
    inject: Act,
    recover: Act,
    *,
    pauses: str | None,
    pause_within: float = PATIENCE,
    lasting: float = 0.0,
    commit_within: float = RESUME_SECONDS,
) -> str:
    """Run a worker under load through an outage of at least *lasting* seconds; return the measurements on one line.

    *pauses* is text that the reason on /readyz must contain, or None for an outage that need not pause the worker.
    """
    await scenario.publish(20)
    await scenario.all_closed_out()
    assert await worker.ready()
    measured = []
    async with scenario.load():
        await inject()
        struck = monotonic()
        if pauses is not None:
            measured += await _watch_the_pause(scenario, worker, pauses, pause_within)
        while monotonic() < struck + lasting:
            assert worker.alive
            assert (await worker.get("/livez"))[0] == 200
            await asyncio.sleep(0.1)
        await recover()
        before = await scenario.count("run_completions")

        async def works() -> bool:
            return await scenario.count("run_completions") > before

        back = await scenario.until(works, within=commit_within, what="the first commit after the recovery")
        ready = back + await scenario.until(worker.ready, what="readiness")
        measured.append(f"first commit after {back:.1f} s, ready after {ready:.1f} s")
    again = await assert_invariants(scenario, worker)
    measured.append(f"{len(scenario.bodies)} runs, {again} events repeated")
    assert await worker.ready()
    return "; ".join(measured)


async def _watch_the_pause(scenario: Scenario, worker: RunningWorker, words: str, within: float) -> list[str]:
    async def paused() -> bool:
        return not await worker.ready()

    noticed = await scenario.until(paused, within=within, what="a pause")
    since = (await worker.state())["since"]

    async def named() -> bool:
        return words in str((await worker.state())["reason"])

    # The first reason may be the error of a run; the probe's, which follows, names the server.
    await scenario.until(named, what=f"a reason with {words!r}, not {await worker.state()}")
    state = await worker.state()

    async def nothing_held() -> bool:
        return await scenario.unacked() == 0

    measured = [f"paused after {noticed:.1f} s ({state['reason'][:60]})"]
    if "RabbitMQ" not in words:  # an unavailable broker requeues by itself
        released = await scenario.until(nothing_held, what="the return of all deliveries")
        measured.append(f"nothing held {released:.1f} s later")
    if worker.process is not None:
        cpu, lines = worker.cpu_seconds(), len(worker.records())
        await asyncio.sleep(WATCH_SECONDS)
        cpu, lines = worker.cpu_seconds() - cpu, len(worker.records()) - lines
        measured.append(
            f"{cpu / WATCH_SECONDS:.0%} of a CPU and {lines / WATCH_SECONDS:.1f} log lines per second meanwhile"
        )
        assert cpu < CPU_SHARE * WATCH_SECONDS, measured
        assert lines <= LOG_LINES_PER_SECOND * WATCH_SECONDS, [r["event"] for r in worker.records()[-lines:]]
    state = await worker.state()
    assert not state["ready"]
    assert state["since"] == since, "one outage, one start"
    return measured
