"""Network outages of RabbitMQ under load: no message is counted as failed, and work resumes by itself."""

import asyncio

import pytest

from tests.support.faults.endurance import RESUME_SECONDS, endure
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(180)

# Seconds until an idle worker detects a dead connection: three heartbeats of 10 s, and 34.9 s next to one busy loop.
# With the client's default heartbeat it would be three minutes.
HEARTBEATS_SECONDS = 60.0


async def test_a_suspended_rabbitmq_pauses_the_worker_until_it_resumes(scenario: Scenario, report):
    async with scenario.worker() as worker:
        report(
            await endure(
                scenario,
                worker,
                lambda: scenario.in_thread(scenario.rabbit.suspend),
                lambda: scenario.in_thread(scenario.rabbit.resume),
                pauses=None,
                lasting=8,
            )
        )


async def test_a_stalled_rabbitmq_connection_pauses_the_worker(scenario: Scenario, report):
    async def inject() -> None:
        scenario.broker_proxy.stall()

    async def recover() -> None:
        scenario.broker_proxy.flow()

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses="RabbitMQ", pause_within=HEARTBEATS_SECONDS))


async def test_dead_rabbitmq_connections_are_replaced_by_new_ones(scenario: Scenario, report):
    """A failover behind one address: packets of the old connections are dropped without a reset."""

    async def inject() -> None:
        scenario.broker_proxy.stall(new_connections_too=False)

    async def recover() -> None:
        """The broker stays available; a missed heartbeat ends the outage."""

    async with scenario.worker() as worker:
        within = HEARTBEATS_SECONDS + RESUME_SECONDS
        report(await endure(scenario, worker, inject, recover, pauses=None, commit_within=within))
        # The late end of the dead connection must not disturb the new one.
        assert sum(record["event"] == "consuming" for record in worker.records()) == 2


async def test_a_refused_rabbitmq_connection_pauses_the_worker(scenario: Scenario, report):
    async def inject() -> None:
        scenario.broker_proxy.refuse()
        scenario.broker_proxy.cut()

    async with scenario.worker(in_process=True) as worker:
        report(await endure(scenario, worker, inject, scenario.broker_proxy.accept, pauses="RabbitMQ", lasting=3))


async def test_repeated_rabbitmq_disconnects_lose_nothing(scenario: Scenario, report):
    async def inject() -> None:
        for _ in range(15):
            scenario.broker_proxy.cut()
            await asyncio.sleep(0.3)

    async def recover() -> None:
        """The worker reconnects."""

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses=None))


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_rabbitmq_connection_lost_at_any_point_of_the_handshake_loses_nothing(
    scenario: Scenario, report, reset
):
    """A broker that dies during the handshake, or a load balancer in front of a broker that is down."""
    breaks = [(responses, reset) for responses in range(10)]
    async with scenario.worker() as worker:
        await scenario.publish(20)
        await scenario.all_closed_out()
        scenario.broker_proxy.breaks = list(breaks)
        scenario.broker_proxy.cut()

        async def all_broken() -> bool:
            assert worker.alive, f"the worker exited with {len(scenario.broker_proxy.breaks)} of {len(breaks)} to go"
            await scenario.publish(1)
            return not scenario.broker_proxy.breaks

        took = await scenario.until(all_broken, what="all breaks")
        # The last one may not be closed out yet.
        back = await scenario.all_closed_out()
        report(f"{len(breaks)} connections broken in {took:.1f} s; all closed out {back:.1f} s later")
        await assert_invariants(scenario, worker)
