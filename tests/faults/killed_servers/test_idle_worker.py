"""A worker without traffic reports the loss of either server, and resumes by itself."""

import asyncio

import pytest

from consumer.delivery.watch import INTERVAL_SECONDS, RESPONSE_SECONDS
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(180)

# A silent connection to RabbitMQ is otherwise noticed after three missed heartbeats, 33 s; to PostgreSQL, never.
NOTICED_SECONDS = 20.0


@pytest.mark.parametrize("server", ["PostgreSQL", "RabbitMQ"])
@pytest.mark.parametrize("loss", ["refused", "silent"])
async def test_an_idle_worker_reports_a_lost_server_and_resumes_when_it_returns(
    scenario: Scenario, report, server: str, loss: str
):
    proxy = scenario.database_proxy if server == "PostgreSQL" else scenario.broker_proxy
    async with scenario.worker() as worker:
        await scenario.publish(1)
        await scenario.all_closed_out()
        if loss == "refused":
            proxy.refuse()
            proxy.cut()
        else:
            proxy.stall()

        paused = await scenario.until(lambda: _paused(worker), what="a pause")

        assert paused < NOTICED_SECONDS
        assert server in (await worker.state())["reason"]
        assert await worker.metric("closeout_consumer_paused") == 1
        await asyncio.sleep(3)
        assert len([r for r in worker.records() if r["event"] == "paused"]) <= 2, "one per reason, not per probe"

        if loss == "refused":
            await proxy.accept()
        else:
            proxy.flow()
        back = await scenario.until(worker.ready, what="the return")
        await scenario.publish(1)
        await scenario.all_closed_out()
        promised = INTERVAL_SECONDS + RESPONSE_SECONDS
        report(
            f"{server} {loss}: reported after {paused:.1f} s (at most {promised:.2f} and a little), back {back:.1f} s"
        )


async def _paused(worker: RunningWorker) -> bool:
    return not await worker.ready()
