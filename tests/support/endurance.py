"""One way through every outage: strike, watch what the worker does, heal, measure, settle the books."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

from tests.support.fault_scenario import Running, Scene

# Seconds: the worker must be back at work this long after the server is.
RESUME_SECONDS = 5.0
# Seconds that deliveries may be held once the worker has paused.
HOLD_SECONDS = 12.0
# Seconds of a pause that are watched for a busy loop, and what may happen in each.
WATCH_SECONDS = 3.0
LINES_A_SECOND = 4.0
CPU_SHARE = 0.25

# Seconds: a pause between two probes, and the longest one.
NAMED_SECONDS = 7.0

Act = Callable[[], Awaitable[object]]


async def endure(
    scene: Scene,
    worker: Running,
    strike: Act,
    heal: Act,
    *,
    pauses: str | None,
    pause_within: float = 15.0,
    lasting: float = 0.0,
    commit_within: float = RESUME_SECONDS,
) -> str:
    """Bring an outage over a worker under load; return in a line what happened when.

    *pauses* is a word of the reason that /readyz must give, or None where work goes on or stops too shortly.
    """
    await scene.publish(20)
    await scene.all_closed_out()
    assert await worker.ready()
    said = []
    async with scene.load():
        await strike()
        struck = monotonic()
        if pauses is not None:
            said += await _watch_the_pause(scene, worker, pauses, pause_within)
        while monotonic() < struck + lasting:
            assert worker.alive
            assert (await worker.get("/livez"))[0] == 200
            await asyncio.sleep(0.1)
        await heal()
        before = await scene.count("run_completions")

        async def works() -> bool:
            return await scene.count("run_completions") > before

        back = await scene.until(works, within=60, what="the first commit after the return")
        ready = back + await scene.until(worker.ready, within=30, what="readiness")
        said.append(f"first commit after {back:.1f} s, ready after {ready:.1f} s")
    again = await scene.settle_books(worker, within=40)
    said.append(f"{len(scene.bodies)} runs, {again} events repeated")
    assert await worker.ready()
    assert back <= commit_within, said
    return "; ".join(said)


async def _watch_the_pause(scene: Scene, worker: Running, words: str, within: float) -> list[str]:
    async def paused() -> bool:
        return not await worker.ready()

    noticed = await scene.until(paused, within=within, what="a pause")
    since = (await worker.state())["since"]

    async def named() -> bool:
        return words in str((await worker.state())["reason"])

    # The first reason may be an error in its own words; the probe's, which comes next, names the server.
    await scene.until(named, within=NAMED_SECONDS, what=f"a reason that says {words}, not {await worker.state()}")
    state = await worker.state()

    async def nothing_held() -> bool:
        return await scene.held() == 0

    said = [f"paused after {noticed:.1f} s ({state['reason'][:60]})"]
    if "RabbitMQ" not in words:  # a broker that is away gives back by itself
        released = await scene.until(nothing_held, within=HOLD_SECONDS, what="the return of all deliveries")
        said.append(f"nothing held {released:.1f} s later")
    if worker.process is not None:
        cpu, lines = worker.cpu_seconds(), len(worker.records())
        await asyncio.sleep(WATCH_SECONDS)
        cpu, lines = worker.cpu_seconds() - cpu, len(worker.records()) - lines
        said.append(f"{cpu / WATCH_SECONDS:.0%} of a CPU and {lines / WATCH_SECONDS:.1f} lines a second meanwhile")
        assert cpu < CPU_SHARE * WATCH_SECONDS, said
        assert lines <= LINES_A_SECOND * WATCH_SECONDS, [r["event"] for r in worker.records()[-lines:]]
    state = await worker.state()
    assert not state["ready"]
    assert state["since"] == since, "one outage, one beginning"
    return said
