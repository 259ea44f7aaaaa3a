"""RabbitMQ stops, gracefully and by SIGKILL, and starts again on the same port.

These tests have separate servers: after RabbitMQ 3.10 was killed, declaring quorum queues in another vhost ended in
INTERNAL_ERROR.
"""

import pytest

from tests.support.endurance import endure
from tests.support.fault_scenario import Scene

pytestmark = pytest.mark.timeout(120)


async def test_a_graceful_restart_of_rabbitmq_loses_nothing(scene: Scene, report):
    async def strike() -> None:
        await scene.aside(scene.rabbit.sync)
        await scene.aside(scene.rabbit.stop)

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, lambda: scene.aside(scene.rabbit.start), pauses="RabbitMQ"))


async def test_a_kill_and_restart_of_rabbitmq_loses_nothing(scene: Scene, report):
    async def strike() -> None:
        await scene.aside(scene.rabbit.sync)
        await scene.aside(scene.rabbit.kill)

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, lambda: scene.aside(scene.rabbit.start), pauses="RabbitMQ"))
