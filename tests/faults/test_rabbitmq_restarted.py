"""RabbitMQ ends, gracefully and by SIGKILL, and comes back on the same port.

In a file, and on servers, of its own: declaring quorum queues
in another vhost ended in INTERNAL_ERROR on RabbitMQ 3.10 after it was killed.
"""

import pytest

from tests.support.endurance import endure
from tests.support.fault_scenario import Scene

pytestmark = pytest.mark.timeout(120)


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
