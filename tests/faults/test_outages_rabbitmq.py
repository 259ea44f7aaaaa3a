"""RabbitMQ goes away in every way it can, under load; no message is blamed, and work resumes by itself."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from consumer.amqp.topology import declare
from consumer.contract.names import EVENTS_EXCHANGE, RUN_COMPLETED_QUEUE
from tests.support import run_messages as runs
from tests.support.endurance import RESUME_SECONDS, endure
from tests.support.fault_scenario import Running, Scene
from tests.support.roles import WORKER_USER, permit

pytestmark = pytest.mark.timeout(180)

# Seconds until a worker that is idle notices a dead line: three heartbeats of 10 s, each a second late, and a look;
# beside one busy loop it was 34.9 s. With the client's own heartbeat it would be three minutes.
HEARTBEATS_SECONDS = 45.0
# Seconds until the relay has sent what the publisher left: its grace, an interval, the longest one in trouble; and as
# many again as a busy machine may need.
RELAY_SECONDS = 30.0


async def test_a_suspended_rabbitmq_pauses_the_worker_until_it_resumes(scene: Scene, report):
    async with scene.worker() as worker:
        report(
            await endure(
                scene,
                worker,
                lambda: scene.aside(scene.rabbit.suspend),
                lambda: scene.aside(scene.rabbit.resume),
                pauses=None,
                lasting=8,
            )
        )


async def test_a_stalled_rabbitmq_connection_pauses_the_worker(scene: Scene, report):
    async def strike() -> None:
        scene.broker_line.stall()

    async def heal() -> None:
        scene.broker_line.flow()

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses="RabbitMQ", pause_within=HEARTBEATS_SECONDS))


async def test_dead_rabbitmq_connections_are_replaced_by_new_ones(scene: Scene, report):
    """A failover behind one address: packets of the old connections vanish, and nobody resets them."""

    async def strike() -> None:
        scene.broker_line.stall(new_lines_too=False)

    async def heal() -> None:
        """The broker is there all the time; what heals is the missed heartbeat."""

    async with scene.worker() as worker:
        within = HEARTBEATS_SECONDS + RESUME_SECONDS
        report(await endure(scene, worker, strike, heal, pauses=None, commit_within=within))
        # The dead line's late end must not disturb the new one.
        assert sum(record["event"] == "consuming" for record in worker.records()) == 2


async def test_a_refused_rabbitmq_connection_pauses_the_worker(scene: Scene, report):
    async def strike() -> None:
        scene.broker_line.refuse()
        scene.broker_line.cut()

    async with scene.worker(in_process=True) as worker:
        report(await endure(scene, worker, strike, scene.broker_line.accept, pauses="RabbitMQ", lasting=3))


async def test_repeated_rabbitmq_disconnects_lose_nothing(scene: Scene, report):
    async def strike() -> None:
        for _ in range(15):
            scene.broker_line.cut()
            await asyncio.sleep(0.3)

    async def heal() -> None:
        """Cut lines are made anew by the worker."""

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses=None))


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_rabbitmq_connection_lost_at_any_point_of_the_handshake_loses_nothing(scene: Scene, report, reset):
    """A broker that dies while it is being connected to; a load balancer in front of one that is down."""
    breaks = [(answers, reset) for answers in range(10)]
    async with scene.worker() as worker:
        await scene.publish(20)
        await scene.all_closed_out()
        scene.broker_line.breaks = list(breaks)
        scene.broker_line.cut()

        async def all_broken() -> bool:
            assert worker.alive, f"it ended by itself with {len(scene.broker_line.breaks)} of {len(breaks)} to go"
            await scene.publish(1)
            return not scene.broker_line.breaks

        took = await scene.until(all_broken, within=60, what="all breaks")
        # The last one may still be on its way.
        back = await scene.all_closed_out(within=RELAY_SECONDS)
        report(f"{len(breaks)} lines broken in {took:.1f} s; all closed out {back:.1f} s later")
        await scene.settle_books(worker)


async def test_connections_closed_by_an_operator_are_opened_again(scene: Scene, report):
    async def strike() -> None:
        for _ in range(3):
            await scene.aside(scene.rabbit.eval, 'rabbit_networking:close_all_connections(<<"maintenance">>)')
            await asyncio.sleep(1)

    async def heal() -> None:
        """They are made anew by the worker."""

    async with scene.worker() as worker:
        report(await endure(scene, worker, strike, heal, pauses=None))


async def test_a_deleted_queue_pauses_the_worker_until_it_is_declared_again(scene: Scene, report):
    async def strike() -> None:
        # What lies in a queue when it is deleted is gone by the operator's will: let it be empty.
        await scene.all_closed_out()
        channel = await scene.broker.channel(confirms=False)
        await channel.queue_delete(RUN_COMPLETED_QUEUE)
        await channel.close()

    async with scene.worker() as worker:
        await scene.publish(20)
        await strike()
        paused = await scene.until(lambda: _paused(worker), within=15, what="a pause")
        reason = (await worker.state())["reason"]
        assert "may have been deleted" in reason or "closeout topology" in reason
        cpu, lines = worker.cpu_seconds(), len(worker.records())
        await asyncio.sleep(4)
        assert worker.cpu_seconds() - cpu < 1
        assert len(worker.records()) - lines < 16
        assert "closeout topology" in (await worker.state())["reason"]
        await declare(scene.broker)
        await scene.publish(20)
        back = await scene.all_closed_out(within=10)
        report(f"paused after {paused:.1f} s; 20 runs closed out {back:.1f} s after the return")
        assert back <= RESUME_SECONDS
        await scene.settle_books(worker)


async def test_a_deleted_event_exchange_keeps_events_in_the_outbox_until_it_is_declared_again(scene: Scene, report):
    async def strike() -> None:
        channel = await scene.broker.channel(confirms=False)
        await channel.exchange_delete(EVENTS_EXCHANGE)
        await channel.close()

    async def heal() -> None:
        await declare(scene.broker)
        await scene.subscribe()

    async with scene.worker() as worker:
        await _events_wait_and_go_out(scene, worker, strike, heal, report)


async def test_a_revoked_publish_permission_keeps_events_in_the_outbox_until_it_is_granted(scene: Scene, report):
    async def changed(by: Callable[[], None]) -> None:
        await scene.aside(by)
        # A channel remembers for a while what it was allowed.
        scene.broker_line.cut()

    async with scene.worker() as worker:
        revoke = partial(scene.rabbit.permit, scene.user, scene.vhost, "^$", r"^closeout\.internal$", ".*")
        give_back = partial(permit, scene.rabbit, scene.vhost, WORKER_USER, name=scene.user)
        await _events_wait_and_go_out(scene, worker, lambda: changed(revoke), lambda: changed(give_back), report)


async def test_a_memory_alarm_keeps_events_in_the_outbox_until_it_clears(scene: Scene, report):
    async def alarm(fraction: str) -> None:
        await scene.aside(scene.rabbit.eval, f"vm_memory_monitor:set_vm_memory_high_watermark({fraction})")

    async with scene.worker() as worker:
        await scene.publish(20)
        await scene.all_closed_out()
        # Nobody can publish in an alarm: let runs be in the queue, and the worker at the claim, when it begins.
        lock = await _lock(scene, "run_completions")
        await scene.publish(30)
        await alarm("0.00001")
        try:
            await lock()
            # RabbitMQ tells a connection of the alarm when it publishes. What waits for confirms then must not wait on.
            # Less than the 10 s that a confirm may take.
            done = await scene.until(lambda: _is(scene.phase_count("COMMITTED"), 30), within=8, what="commits")
            acked = await scene.until(lambda: _is(scene.held(), 0), within=8, what="acks in an alarm")
            assert await scene.count("outbox_events") == 90
            assert await worker.ready()
            lines, cpu = len(worker.records()), worker.cpu_seconds()
            await asyncio.sleep(4)
            assert len(worker.records()) - lines < 12, [r["event"] for r in worker.records()[lines:]]
            assert worker.cpu_seconds() - cpu < 1
        finally:
            await alarm("0.6")
        back = await scene.all_closed_out(within=RELAY_SECONDS)
        report(f"30 commits after {done:.1f} s, acked {acked:.1f} s later; events out {back:.1f} s after the alarm")
        await scene.settle_books(worker)


async def test_channels_closed_by_the_delivery_ack_timeout_are_opened_again(scene: Scene, report):
    """The broker's consumer_timeout, 30 minutes by default, here a second."""
    await scene.aside(
        scene.rabbit.eval,
        "application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 500)",
    )
    try:
        async with scene.worker() as worker:
            await scene.publish(20)
            await scene.all_closed_out()
            lock = await _lock(scene, "run_completions")
            await scene.publish(20)
            paused = await scene.until(lambda: _paused(worker), within=20, what="a pause")
            reason = (await worker.state())["reason"]
            assert "RabbitMQ closed the channel" in reason
            await lock()
            back = await scene.all_closed_out(within=10)
            report(f"paused after {paused:.1f} s ({reason[:80]}); closed out {back:.1f} s after the return")
            await scene.settle_books(worker)
            assert back <= RESUME_SECONDS
    finally:
        await scene.aside(
            scene.rabbit.eval,
            "application:set_env(rabbit, consumer_timeout, 1800000),"
            "application:set_env(rabbit, channel_tick_interval, 60000)",
        )


async def _events_wait_and_go_out(scene: Scene, worker: Running, strike, heal, report) -> None:
    """Runs are closed out and acked as ever; their events wait in the outbox, and go out by themselves."""
    await scene.publish(20)
    await scene.all_closed_out()
    await strike()
    await scene.publish(30)
    await scene.until(lambda: _is(scene.phase_count("COMMITTED"), 30), within=15, what="commits")
    await scene.until(lambda: _is(scene.held(), 0), within=15, what="acks")
    assert await scene.count("outbox_events") == 90
    await scene.until(worker.ready, within=15, what="readiness")
    # Long enough for the relay to have tried.
    lines, cpu = len(worker.records()), worker.cpu_seconds()
    await asyncio.sleep(4)
    assert len(worker.records()) - lines < 16, [r["event"] for r in worker.records()[lines:]]
    assert worker.cpu_seconds() - cpu < 1
    await heal()
    later = ", ".join(f"'{runs.run_id_of(body)}'" for body in await scene.publish(5))
    told = f"phase = 'EVENTS_PUBLISHED' AND run_id IN ({later})"
    # Of these: the relay may be quicker with the earlier ones.
    new = await scene.until(
        lambda: _is(scene.count("run_completions", told), 5), within=RESUME_SECONDS, what="events of later runs"
    )
    back = await scene.all_closed_out(within=RELAY_SECONDS)
    report(f"events of new runs after {new:.1f} s, of the 30 earlier ones {new + back:.1f} s after the return")
    await scene.settle_books(worker)


async def _paused(worker: Running) -> bool:
    return not await worker.ready()


async def _is(found: Awaitable[int], expected: int) -> bool:
    return await found == expected


async def _lock(scene: Scene, table: str):
    """Hold a lock on *table* until the function that is returned is awaited."""
    import asyncpg

    conn = await asyncpg.connect(scene.postgres.url(scene.database))
    await conn.execute(f"BEGIN; LOCK TABLE governance.{table} IN ACCESS EXCLUSIVE MODE")
    return conn.close
