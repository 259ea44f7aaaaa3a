"""No property or header that RabbitMQ accepts stops the worker: the message is closed out or parked."""

import asyncio
import decimal
import sys
from typing import Any

import pika
import pytest

from consumer.parked.copies import headers_of
from tests.support import run_messages as runs
from tests.support.traffic import emptied, eventually, parked, publish, published_runs, worker


def nested(depth: int) -> dict[str, Any]:
    table: dict[str, Any] = {"end": 1}
    for _ in range(depth):
        table = {"n": table}
    return table


# Properties of a careless runner; pika writes bytes and numbers unchecked.
HOSTILE: dict[str, dict[str, Any]] = {
    "a timestamp in microseconds": {"timestamp": 1_777_777_777_000_000},
    "a timestamp in nanoseconds": {"timestamp": 1_777_777_777_000_000_000},
    "the last timestamp": {"timestamp": 2**64 - 1},
    "a message id in Latin-1": {"message_id": b"caf\xe9"},
    "a long message id that is not text": {"message_id": b"\xff" * 255},
    "a type that is not text": {"type": b"\xff\xfe"},
    "a correlation id that is not text": {"correlation_id": b"\x80"},
    "a header's name that is not text": {"headers": {b"\xe9": 1, "traceparent": "00-x"}},
    "a header's value that is not text": {"headers": {"name": b"\xe9", "list": [b"\xe9", {"deep": b"\xff"}]}},
    "headers within headers, 700 deep": {"headers": nested(700)},
    "a cluster id": {"cluster_id": "somewhere"},
    "numbers at their limits": {"headers": {"i": 2**63 - 1, "n": -(2**63), "d": decimal.Decimal("-1.5")}},
    "attempts that are not a number": {"headers": {"x-closeout-attempts": b"\xff", "x-closeout-first-seen": b"\xff"}},
    "our own headers, forged": {
        "headers": {"x-closeout-exchange": "forged", "x-closeout-routing-key": b"\xff", "x-closeout-reason": "forged"}
    },
}


def send(amqp_url: str, routing_key: str | bytes, bodies: list[bytes], properties: dict[str, Any]) -> None:
    sys.setrecursionlimit(max(10_000, sys.getrecursionlimit()))  # pika writes nested headers by recursion
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        given = pika.BasicProperties(**{"content_type": "application/json", **properties})
        for body in bodies:
            channel.basic_publish("runs", routing_key, body, given, mandatory=True)


@pytest.fixture
def usual_recursion_limit() -> Any:
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("properties", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.usefixtures("usual_recursion_limit")
async def test_hostile_properties_neither_block_a_valid_run_nor_alter_a_parked_one(
    database_url, amqp_url, engine, broker, properties
):
    await asyncio.to_thread(send, amqp_url, "run.completed", [runs.body(), b"{nonsense"], properties)
    sys.setrecursionlimit(1000)
    async with worker(database_url, amqp_url):
        await publish(broker, runs.body())
        (message,) = await parked(broker, 1)
        await eventually(engine, published_runs(), 2)
    assert message.body == b"{nonsense"
    headers = headers_of(message)
    assert (headers["x-closeout-reason"], headers["x-closeout-exchange"]) == ("invalid_json", "runs")
    assert headers["x-closeout-routing-key"] == "run.completed"
    assert await emptied(broker, "closeout.run-completed") == []


async def test_headers_too_large_for_the_frame_are_omitted_and_named(rabbit, database_url, amqp_url, broker):
    """An operator lowered frame_max: the broker would close the connection for the copy's frame, repeatedly."""
    await publish(broker, b"{nonsense", headers={"large": "x" * 8_000, "small": "kept"})
    rabbit.eval("application:set_env(rabbit, frame_max, 8192)")
    try:
        async with worker(database_url, amqp_url):
            (message,) = await parked(broker, 1)
    finally:
        rabbit.eval("application:set_env(rabbit, frame_max, 131072)")
    headers = headers_of(message)
    assert (headers["x-closeout-dropped-headers"], headers["small"]) == ("large", "kept")
