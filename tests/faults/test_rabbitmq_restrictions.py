"""An operator's changes and the broker's limits under load: no message is counted as failed, and work resumes."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from aiormq import spec

from consumer.amqp.confirmed_channel import CONFIRM_TIMEOUT_SECONDS, ConfirmedChannel
from consumer.amqp.topology import declare
from consumer.contract.names import EVENTS_EXCHANGE, PARKED_QUEUE, RUN_COMPLETED_KEY, RUN_COMPLETED_QUEUE, RUNS_EXCHANGE
from tests.support import run_messages as runs
from tests.support.command_line import closeout
from tests.support.faults.endurance import RESUME_SECONDS, endure
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.roles import WORKER_USER, permit

pytestmark = pytest.mark.timeout(180)


async def test_connections_closed_by_an_operator_are_opened_again(scenario: Scenario, report):
    async def inject() -> None:
        for _ in range(3):
            await scenario.in_thread(scenario.rabbit.eval, 'rabbit_networking:close_all_connections(<<"maintenance">>)')
            await asyncio.sleep(1)

    async def recover() -> None:
        """The worker reconnects."""

    async with scenario.worker() as worker:
        report(await endure(scenario, worker, inject, recover, pauses=None))


async def test_a_deleted_queue_pauses_the_worker_until_it_is_declared_again(scenario: Scenario, report):
    async def inject() -> None:
        # Messages in a deleted queue are lost by the operator's decision: the queue must be empty.
        await scenario.all_closed_out()
        channel = await scenario.broker.channel(confirms=False)
        await channel.queue_delete(RUN_COMPLETED_QUEUE)
        await channel.close()

    async with scenario.worker() as worker:
        await scenario.publish(20)
        await inject()
        paused = await scenario.until(lambda: _paused(worker), what="a pause")
        reason = (await worker.state())["reason"]
        assert "queue may have been deleted" in reason or "closeout topology" in reason
        cpu, lines = worker.cpu_seconds(), len(worker.records())
        await asyncio.sleep(4)
        assert worker.cpu_seconds() - cpu < 1
        assert len(worker.records()) - lines < 16
        assert "closeout topology" in (await worker.state())["reason"]
        await declare(scenario.broker)
        await scenario.publish(20)
        back = await scenario.all_closed_out()
        report(f"paused after {paused:.1f} s; 20 runs closed out {back:.1f} s after the return")
        assert back <= RESUME_SECONDS
        await assert_invariants(scenario, worker)


async def test_a_deleted_event_exchange_keeps_events_in_the_outbox_until_it_is_declared_again(
    scenario: Scenario, report
):
    async def inject() -> None:
        channel = await scenario.broker.channel(confirms=False)
        await channel.exchange_delete(EVENTS_EXCHANGE)
        await channel.close()

    async def recover() -> None:
        await declare(scenario.broker)
        await scenario.subscribe()

    async with scenario.worker() as worker:
        await _events_stay_in_the_outbox_until(scenario, worker, inject, recover, report)


async def test_a_revoked_publish_permission_keeps_events_in_the_outbox_until_it_is_granted(scenario: Scenario, report):
    async def changed(by: Callable[[], None]) -> None:
        await scenario.in_thread(by)
        # A channel caches its permissions for a while.
        scenario.broker_proxy.cut()

    async with scenario.worker() as worker:
        revoke = partial(scenario.rabbit.permit, scenario.user, scenario.vhost, "^$", r"^closeout\.internal$", ".*")
        give_back = partial(permit, scenario.rabbit, scenario.vhost, WORKER_USER, name=scenario.user)
        await _events_stay_in_the_outbox_until(
            scenario, worker, lambda: changed(revoke), lambda: changed(give_back), report
        )


async def test_a_refused_routing_key_delays_only_the_runs_with_that_event(scenario: Scenario, report):
    async def permitted(keys: str) -> None:
        topics = [(EVENTS_EXCHANGE, keys, "^$")]
        own = ("^$", r"^(governance\.events|closeout\.internal)$", ".*")
        await scenario.in_thread(partial(scenario.rabbit.permit, scenario.user, scenario.vhost, *own, topics=topics))
        scenario.broker_proxy.cut()  # a channel caches its permissions for a while

    def bodies() -> list[bytes]:
        failed = [runs.body(status="failed", error_code=f"SECURITY_{n}") for n in range(3)]
        return [runs.body(status="succeeded", error_code=None) for _ in range(100)] + failed

    async with scenario.worker() as worker:
        await permitted(r"^(policy|run)\..*|^incident\.created\.none$")
        for body in bodies():
            await scenario.publish_body(body)
        took = await scenario.until(lambda: _is(scenario.phase_count(), 100), what="the other runs' events")
        aside = await scenario.until(
            lambda: _is(scenario.count("outbox_events", "set_aside_reason LIKE '%access to topic%'"), 3),
            what="the refused runs set aside",
        )
        assert await worker.ready()
        assert await scenario.phase_count("COMMITTED") == 3
        await permitted(".*")
        # The relay tries again after a minute; the operator need not wait for it.
        drained = await closeout(
            "outbox",
            "drain",
            DATABASE_URL=scenario.postgres.url(scenario.database),
            AMQP_URL=scenario.rabbit.url(scenario.vhost),
        )
        assert drained.returncode == 0, drained.stderr
        await scenario.all_closed_out()
        report(f"100 runs published after {took:.1f} s, 3 set aside {aside:.1f} s later")
        await assert_invariants(scenario, worker)


@pytest.mark.parametrize("refusal", ["full", "deleted"])
async def test_messages_that_cannot_be_parked_are_delayed_and_all_others_are_closed_out(
    scenario: Scenario, report, refusal
):
    vhost = f'<<"{scenario.vhost}">>'
    limit = (
        f'rabbit_policy:set({vhost}, <<"full">>, <<"parked">>, [{{<<"max-length">>, 1}}], 50, <<"queues">>, <<"x">>)'
    )

    async def refuse() -> None:
        if refusal == "full":
            await scenario.in_thread(scenario.rabbit.eval, limit)
        else:
            channel = await scenario.broker.channel(confirms=False)
            await channel.queue_delete(PARKED_QUEUE)

    async def accept() -> None:
        if refusal == "full":
            await scenario.in_thread(scenario.rabbit.eval, f'rabbit_policy:delete({vhost}, <<"full">>, <<"x">>)')
        else:
            await declare(scenario.broker)

    async with scenario.worker() as worker:
        await refuse()
        await publish_invalid(scenario, 700)
        refused = await scenario.until(lambda: _warns(worker, "cannot be parked"), what="a warning in /readyz")
        assert await worker.metric("closeout_parking_refused") == 1
        await scenario.publish(300)
        took = await scenario.all_closed_out()
        assert await worker.ready()
        assert "the parked queue refuses messages; they are delayed" in [r["event"] for r in worker.records()]

        await accept()
        back = await scenario.until(lambda: _is(scenario.length(PARKED_QUEUE), 700), what="parked messages", within=60)
        assert await worker.metric("closeout_parking_refused") == 0
        assert not await _warns(worker, "cannot be parked")
        report(f"refused after {refused:.1f} s; 300 runs in {took:.1f} s; 700 parked {back:.1f} s after the return")
        assert await worker.metric('closeout_deliveries_total{result="parked"}') == 700
        assert await worker.metric('closeout_deliveries_total{result="requeued"}') == 0


async def test_a_message_that_no_queue_accepts_is_held_and_all_others_are_closed_out(scenario: Scenario):
    async with scenario.worker() as worker:
        forbid = partial(scenario.rabbit.permit, scenario.user, scenario.vhost, "^$", r"^governance\.events$", ".*")
        await scenario.in_thread(forbid)
        scenario.broker_proxy.cut()  # a channel caches its permissions for a while
        await publish_invalid(scenario, 20)
        await scenario.until(lambda: _warns(worker, "cannot be parked"), what="a warning in /readyz")

        await scenario.publish(100)
        await scenario.all_closed_out()

        assert await worker.ready()
        await scenario.in_thread(partial(permit, scenario.rabbit, scenario.vhost, WORKER_USER, name=scenario.user))
        scenario.broker_proxy.cut()
        # A connection that was cut before an ack leaves a second copy.
        await scenario.until(lambda: _at_least(scenario.length(PARKED_QUEUE), 20), what="parked messages", within=60)


async def publish_invalid(scenario: Scenario, number: int) -> None:
    channel = ConfirmedChannel(scenario.broker)
    place = {"exchange": RUNS_EXCHANGE, "routing_key": RUN_COMPLETED_KEY}
    bodies = (b"{%d" % n for n in range(number))
    await asyncio.gather(*(channel.send(**place, body=body, properties=spec.Basic.Properties()) for body in bodies))


async def _at_least(number: Awaitable[int], wanted: int) -> bool:
    return await number >= wanted


async def _warns(worker: RunningWorker, words: str) -> bool:
    return words in str((await worker.state()).get("warning"))


async def test_a_memory_alarm_keeps_events_in_the_outbox_until_it_clears(scenario: Scenario, report):
    async def alarm(fraction: str) -> None:
        await scenario.in_thread(scenario.rabbit.eval, f"vm_memory_monitor:set_vm_memory_high_watermark({fraction})")

    async with scenario.worker() as worker:
        await scenario.publish(20)
        await scenario.all_closed_out()
        # Nothing can be published in an alarm: the runs are queued and the worker is at the claim before it.
        lock = await _lock(scenario, "run_completions")
        await scenario.publish(30)
        await alarm("0.00001")
        try:
            await lock()
            # RabbitMQ reports the alarm to a connection that publishes; waits for confirms must end then.
            done = await scenario.until(lambda: _is(scenario.phase_count("COMMITTED"), 30), what="commits")
            acked = await scenario.until(lambda: _is(scenario.unacked(), 0), what="acks in an alarm")
            assert done + acked < CONFIRM_TIMEOUT_SECONDS
            assert await scenario.count("outbox_events") == 90
            assert await worker.ready()
            lines, cpu = len(worker.records()), worker.cpu_seconds()
            await asyncio.sleep(4)
            assert len(worker.records()) - lines < 12, [r["event"] for r in worker.records()[lines:]]
            assert worker.cpu_seconds() - cpu < 1
        finally:
            await alarm("0.6")
        back = await scenario.all_closed_out()
        report(f"30 commits after {done:.1f} s, acked {acked:.1f} s later; events out {back:.1f} s after the alarm")
        await assert_invariants(scenario, worker)


async def test_channels_closed_by_the_delivery_ack_timeout_are_opened_again(scenario: Scenario, report):
    """The broker's consumer_timeout: 30 minutes by default, one second here."""
    await scenario.in_thread(
        scenario.rabbit.eval,
        "application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 500)",
    )
    try:
        async with scenario.worker() as worker:
            await scenario.publish(20)
            await scenario.all_closed_out()
            lock = await _lock(scenario, "run_completions")
            await scenario.publish(20)
            paused = await scenario.until(lambda: _paused(worker), what="a pause")
            reason = (await worker.state())["reason"]
            assert "RabbitMQ closed the channel" in reason
            await lock()
            back = await scenario.all_closed_out()
            report(f"paused after {paused:.1f} s ({reason[:80]}); closed out {back:.1f} s after the return")
            await assert_invariants(scenario, worker)
            assert back <= RESUME_SECONDS
    finally:
        await scenario.in_thread(
            scenario.rabbit.eval,
            "application:set_env(rabbit, consumer_timeout, 1800000),"
            "application:set_env(rabbit, channel_tick_interval, 60000)",
        )


async def _events_stay_in_the_outbox_until(scenario: Scenario, worker: RunningWorker, inject, recover, report) -> None:
    """Runs are closed out and acked; their events stay in the outbox and are published after *recover*."""
    await scenario.publish(20)
    await scenario.all_closed_out()
    await inject()
    await scenario.publish(30)
    await scenario.until(lambda: _is(scenario.phase_count("COMMITTED"), 30), what="commits")
    await scenario.until(lambda: _is(scenario.unacked(), 0), what="acks")
    assert await scenario.count("outbox_events") == 90
    await scenario.until(worker.ready, what="readiness")
    # Long enough for the relay to have run.
    lines, cpu = len(worker.records()), worker.cpu_seconds()
    await asyncio.sleep(4)
    assert len(worker.records()) - lines < 16, [r["event"] for r in worker.records()[lines:]]
    assert worker.cpu_seconds() - cpu < 1
    await recover()
    later = ", ".join(f"'{runs.run_id_of(body)}'" for body in await scenario.publish(5))
    published = f"phase = 'EVENTS_PUBLISHED' AND run_id IN ({later})"
    # Of these only: the relay may publish the earlier ones first.
    new = await scenario.until(
        lambda: _is(scenario.count("run_completions", published), 5), within=RESUME_SECONDS, what="events of later runs"
    )
    back = await scenario.all_closed_out()
    report(f"events of new runs after {new:.1f} s, of the 30 earlier ones {new + back:.1f} s after the return")
    await assert_invariants(scenario, worker)


async def _paused(worker: RunningWorker) -> bool:
    return not await worker.ready()


async def _is(found: Awaitable[int], expected: int) -> bool:
    return await found == expected


async def _lock(scenario: Scenario, table: str):
    """Lock *table* until the returned function is awaited."""
    import asyncpg

    conn = await asyncpg.connect(scenario.postgres.url(scenario.database))
    await conn.execute(f"BEGIN; LOCK TABLE governance.{table} IN ACCESS EXCLUSIVE MODE")
    return conn.close
