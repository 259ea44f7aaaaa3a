"""A batch of events on a real broker: written together, each confirmed separately."""

import asyncio
from uuid import uuid4

import pytest
from aiormq import spec

from consumer.amqp.confirmed_channel import ConfirmedChannel, RefusedError
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.contract.events import OutboxEvent
from consumer.contract.names import EVENTS_EXCHANGE
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from tests.support.faults.proxy import Proxy
from tests.support.traffic import listen, received
from tests.support.waiting import until


def event(*, routing_key: str = "incident.created.HIGH", body: str = "{}") -> OutboxEvent:
    return OutboxEvent(
        tenant_id="acme", run_id=uuid4(), sequence=1, event_id=uuid4(), type="incident.created",
        routing_key=routing_key, body=body,
    )  # fmt: skip


def publisher(broker: BrokerConnection, *, require_subscribers: bool = False) -> EventPublisher:
    return EventPublisher(ConfirmedChannel(broker), metrics=Metrics(), require_subscribers=require_subscribers)


async def test_a_batch_arrives_complete_in_order_and_is_confirmed(broker):
    found = await listen(broker)
    # The last ones need two body frames, and a hundred.
    events = [event(body=f"{n}é") for n in range(300)] + [event(body="x" * n) for n in (131_065, 13_000_000)]

    outcome = await publisher(broker).publish(events)

    assert (outcome.confirmed, outcome.failure) == (events, None)
    for sent, got in zip(events, await received(found, len(events)), strict=True):
        properties = got.header.properties
        assert got.body == sent.body.encode()
        assert (properties.message_id, properties.correlation_id) == (str(sent.event_id), str(sent.run_id))
        assert (properties.message_type, properties.delivery_mode) == ("incident.created", 2)
        assert (properties.content_type, got.routing_key) == (
            "application/cloudevents+json",
            "incident.created.HIGH",
        )


async def test_an_empty_batch_completes_immediately(broker):
    async with asyncio.timeout(2):
        outcome = await publisher(broker).publish([])
    assert (outcome.confirmed, outcome.failure) == ([], None)


async def test_concurrent_batches_on_one_channel_get_their_own_confirms(broker):
    shared = publisher(broker)
    batches = [[event() for _ in range(40)] for _ in range(10)]

    outcomes = await asyncio.gather(*(shared.publish(batch) for batch in batches))

    assert [outcome.confirmed for outcome in outcomes] == batches


async def test_unroutable_events_of_a_batch_are_distinguished_from_routed_ones(broker):
    channel = await broker.channel(confirms=False)
    queue = (await channel.queue_declare("", exclusive=True)).queue or ""
    await channel.queue_bind(queue, EVENTS_EXCHANGE, routing_key="taken")
    events = [event(routing_key="taken" if n % 3 else "not.taken") for n in range(30)]

    lenient = await publisher(broker).publish(events)
    strict = await publisher(broker, require_subscribers=True).publish(events)

    assert lenient.confirmed == events
    assert strict.confirmed == [e for e in events if e.routing_key == "taken"]
    assert "not.taken" in str(strict.failure)


async def test_a_channel_closed_during_a_batch_fails_it_and_the_next_uses_a_new_channel(broker):
    channel = await broker.channel(confirms=False)
    await channel.exchange_delete(EVENTS_EXCHANGE)
    mine = publisher(broker)

    gone = await mine.publish([event() for _ in range(20)])
    await declare(broker)
    back = await mine.publish([event() for _ in range(20)])

    assert gone.confirmed == []
    assert "NOT_FOUND" in str(gone.failure)
    assert (len(back.confirmed), back.failure) == (20, None)


async def test_a_connection_lost_during_a_batch_fails_the_batch(amqp_url, rabbit):
    line = await Proxy(rabbit.port).accept()
    other = BrokerConnection(amqp_url.replace(f":{rabbit.port}/", f":{line.port}/"), name="ends")
    mine = publisher(other)
    await mine.publish([event()])
    line.stall()  # otherwise the broker might confirm all of it before it closes
    events = [event(body="x" * 1_000_000) for _ in range(5)]
    task = asyncio.create_task(mine.publish(events))
    await asyncio.to_thread(rabbit.eval, 'rabbit_networking:close_all_user_connections(<<"closeout">>, <<"test">>)')
    line.flow()

    outcome = await task

    assert outcome.failure
    assert outcome.confirmed == []
    await other.close()
    line.close()


async def test_a_lost_connection_is_closed_before_a_new_one_is_opened(amqp_url, rabbit):
    """Otherwise the garbage collector closes it, in any thread, with a warning in the worker's log."""
    made = BrokerConnection(amqp_url, name="lost")
    await made.channel(confirms=True)
    lost = made._connection
    assert lost is not None
    await asyncio.to_thread(rabbit.eval, 'rabbit_networking:close_all_user_connections(<<"closeout">>, <<"test">>)')
    await until(lambda: not made.is_open)

    await made.channel(confirms=True)

    assert made._connection is not lost
    assert lost.is_closed
    await made.close()


async def test_cancelling_a_batch_leaves_the_channel_usable(broker):
    mine = publisher(broker)
    large = [event(body="x" * 1_000_000) for _ in range(20)]
    task = asyncio.create_task(mine.publish(large))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    events = [event() for _ in range(20)]
    assert (await mine.publish(events)).confirmed == events


@pytest.mark.parametrize(
    ("write", "why"), [("^$", "exchange 'governance.events'"), ("^governance", "topic 'incident.created.HIGH'")]
)
async def test_an_event_refused_by_permissions_names_the_missing_permission(rabbit, bare_amqp_url, broker, write, why):
    vhost = bare_amqp_url.rsplit("/", 1)[1]
    theirs = BrokerConnection(rabbit.add_user(f"mute-{vhost}", "pw", "^$", write, "^$", vhost), name="tests")
    rabbit.permit(f"mute-{vhost}", vhost, "^$", write, "^$", topics=[(EVENTS_EXCHANGE, "^run", "^$")])

    outcome = await publisher(theirs).publish([event(), event()])

    assert outcome.confirmed == []
    assert outcome.failure is not None
    assert "ACCESS_REFUSED" in outcome.failure
    assert why in outcome.failure
    await theirs.close()


async def test_concurrent_copies_with_one_message_id_each_report_whether_they_were_routed(broker):
    """The sender chooses the id: two messages parked concurrently may share it, and each has its own confirm."""
    channel = ConfirmedChannel(broker)

    async def send() -> None:
        same = spec.Basic.Properties(message_id="1")
        await channel.send(exchange=EVENTS_EXCHANGE, routing_key="not.taken", body=b"x", properties=same)

    responses = await asyncio.gather(*(send() for _ in range(3)), return_exceptions=True)
    assert [type(response) for response in responses] == [RefusedError] * 3


async def test_concurrently_published_events_stay_in_the_outbox_where_unroutable(broker):
    """The run was delivered twice: the second finds its events in the outbox while the first is publishing them."""
    shared, events = publisher(broker, require_subscribers=True), [event(routing_key="not.taken") for _ in range(3)]

    outcomes = await asyncio.gather(*(shared.publish(events) for _ in range(3)))

    assert [outcome.confirmed for outcome in outcomes] == [[], [], []]
    assert (await shared.publish(events)).failure  # the channel is closed


async def test_events_are_published_to_a_broker_without_a_frame_limit(rabbit, bare_amqp_url, broker):
    found = await listen(broker)
    rabbit.eval("application:set_env(rabbit, frame_max, 0)")
    unlimited = BrokerConnection(bare_amqp_url, name="unlimited")
    try:
        outcome = await publisher(unlimited).publish([event(body="x" * 200_000)])
        await received(found, 1)
    finally:
        rabbit.eval("application:set_env(rabbit, frame_max, 131072)")
        await unlimited.close()
    assert outcome.failure is None
