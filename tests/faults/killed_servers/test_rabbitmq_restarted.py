"""RabbitMQ stops, gracefully and by SIGKILL, and starts again on the same port.

A separate file has separate servers: on RabbitMQ 3.10, declaring quorum queues in another vhost after a kill ended in
INTERNAL_ERROR.
"""

import pytest

from tests.support.faults.endurance import endure
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", params=["4", "3.10"])
def rabbitmq_version(request):
    return request.param


async def test_a_graceful_restart_of_rabbitmq_loses_nothing(scenario: Scenario, report):
    async def inject() -> None:
        await scenario.in_thread(scenario.rabbit.sync)
        await scenario.in_thread(scenario.rabbit.stop)

    async with scenario.worker() as worker:
        report(
            await endure(scenario, worker, inject, lambda: scenario.in_thread(scenario.rabbit.start), pauses="RabbitMQ")
        )


async def test_a_kill_and_restart_of_rabbitmq_loses_nothing(scenario: Scenario, report):
    async def inject() -> None:
        await scenario.in_thread(scenario.rabbit.sync)
        await scenario.in_thread(scenario.rabbit.kill)

    async with scenario.worker() as worker:
        report(
            await endure(scenario, worker, inject, lambda: scenario.in_thread(scenario.rabbit.start), pauses="RabbitMQ")
        )
