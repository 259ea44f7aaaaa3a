"""RabbitMQ stops, gracefully and by SIGKILL, and starts again on the same port.

These tests have separate servers: after RabbitMQ 3.10 was killed, declaring quorum queues in another vhost ended in
INTERNAL_ERROR.
"""

import pytest

from tests.support.endurance import endure
from tests.support.fault_scenario import Scene

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", params=["4", "3.10"])
def rabbitmq_version(request):
    return request.param


async def test_rabbitmq_restarted_gracefully(scene: Scene, report):
    async def strike() -> None:
        await scene.aside(scene.rabbit.sync)
        await scene.aside(scene.rabbit.stop)

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, lambda: scene.aside(scene.rabbit.start), pauses="RabbitMQ"))


async def test_rabbitmq_killed_and_restarted(scene: Scene, report):
    async def strike() -> None:
        await scene.aside(scene.rabbit.sync)
        await scene.aside(scene.rabbit.kill)

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, lambda: scene.aside(scene.rabbit.start), pauses="RabbitMQ"))
