"""The exchanges, queues and bindings that must exist at the broker, and the delay of a counted retry.

``deploy/rabbitmq/definitions.json`` has the same, with permissions, for import. ``closeout topology`` declares them as
a user with configure permission; the worker has none and declares nothing.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import AMQPChannelError

from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.contract.names import (
    EVENTS_EXCHANGE,
    INTERNAL_EXCHANGE,
    PARKED_QUEUE,
    RETRY_QUEUE,
    RUN_COMPLETED_KEY,
    RUN_COMPLETED_QUEUE,
    RUNS_EXCHANGE,
)
from consumer.errors import UnavailableError, one_line

# Milliseconds between two attempts at a run whose failure is specific to that run.
RETRY_DELAY_MS = 10_000
# A quorum queue also counts redeliveries after a lost connection, and RabbitMQ 4 drops a message after 20 by default:
# an outage would drop good messages. Closeout counts attempts itself (parked/copies.py), so the broker's limit is set
# out of reach, and a message that it would still drop is dead-lettered to the parked queue.
UNREACHABLE_DELIVERY_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange to declare."""

    name: str
    type: str
    arguments: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue to declare."""

    name: str
    arguments: MappingProxyType[str, Any]


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that must exist at the broker."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[tuple[str, str, str], ...] = field(default=())  # queue, exchange, routing key
    # Destination, source, routing key. Bound last: their destination must already lead to queues.
    exchange_bindings: tuple[tuple[str, str, str], ...] = field(default=())


def _quorum(name: str, **arguments: str | int) -> Queue:
    # On every queue: reading parked messages counts as delivering them.
    arguments["delivery_limit"] = UNREACHABLE_DELIVERY_LIMIT
    named = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
    return Queue(name, MappingProxyType({"x-queue-type": "quorum", **named}))


def intake_queue(name: str, **arguments: str) -> Queue:
    """Return a queue of runs; what its delivery limit would drop goes to the parked queue."""
    return _quorum(
        name,
        dead_letter_exchange="",
        dead_letter_routing_key=PARKED_QUEUE,
        # At-least-once dead lettering needs it: overflow is refused, not dropped.
        dead_letter_strategy="at-least-once",
        overflow="reject-publish",
        **arguments,
    )


TOPOLOGY = Topology(
    exchanges=(
        Exchange(RUNS_EXCHANGE, "topic"),
        Exchange(EVENTS_EXCHANGE, "topic"),
        # The worker writes its own two queues through it, without permission to write to every queue.
        Exchange(INTERNAL_EXCHANGE, "direct"),
    ),
    queues=(
        # At its limit, if it has one, it refuses messages: the default would drop the oldest. An argument takes
        # precedence over a policy.
        _quorum(PARKED_QUEUE, overflow="reject-publish"),
        intake_queue(RUN_COMPLETED_QUEUE),
        _quorum(
            RETRY_QUEUE,
            message_ttl=RETRY_DELAY_MS,
            dead_letter_exchange="",
            dead_letter_routing_key=RUN_COMPLETED_QUEUE,
            dead_letter_strategy="at-least-once",
            overflow="reject-publish",
        ),
    ),
    bindings=(
        (RUN_COMPLETED_QUEUE, RUNS_EXCHANGE, RUN_COMPLETED_KEY),
        (PARKED_QUEUE, INTERNAL_EXCHANGE, PARKED_QUEUE),
        (RETRY_QUEUE, INTERNAL_EXCHANGE, RETRY_QUEUE),
    ),
)


# The message for a parked queue that an earlier version declared.
PARKED_BEFORE = (
    "without x-overflow: a max-length policy could drop messages, unless the policy closeout of "
    "deploy/rabbitmq/definitions.json is set"
)


# RabbitMQ's error for the type of an exchange whose plugin is not enabled, its description, and what to do.
UNKNOWN_TYPE = "unknown exchange type"
PLUGIN_MISSING = "the plugin rabbitmq_consistent_hash_exchange is not enabled"
ENABLE_PLUGIN = "run rabbitmq-plugins enable rabbitmq_consistent_hash_exchange on every node, or set INTAKE_QUEUES=1"


class TopologyMismatchError(Exception):
    """An exchange or queue exists with other properties; the text names it and what to do."""


async def declare(connection: BrokerConnection, topology: Topology = TOPOLOGY) -> list[str]:
    """Declare *topology*; return a line for each object that now exists. Safe to repeat.

    Raises :class:`TopologyMismatchError` naming every object that exists with other properties, and
    :class:`UnavailableError` if the broker is unavailable or refuses for another reason.
    """
    done: list[str] = []
    faults: list[str] = []
    for exchange in topology.exchanges:
        await request_one(connection, f"exchange {exchange.name}", done, faults, _exchange(exchange))
    for queue in topology.queues:
        await _declare_queue(connection, queue, done, faults)
    if faults:
        raise TopologyMismatchError("\n".join(faults))
    for binding in topology.bindings:
        queue_name, exchange_name, key = binding
        what = f"binding {exchange_name} --{key}--> {queue_name}"
        await request_one(connection, what, done, faults, _binding(*binding))
    for destination, source, key in topology.exchange_bindings:
        what = f"binding {source} --{key}--> {destination}"
        await request_one(connection, what, done, faults, _exchange_binding(destination, source, key))
    return done


Request = Callable[[AmqpChannel], Awaitable[object]]


def _exchange(exchange: Exchange) -> Request:
    return lambda channel: channel.exchange_declare(
        exchange.name, exchange_type=exchange.type, durable=True, arguments=dict(exchange.arguments)
    )


def _queue(queue: Queue) -> Request:
    return lambda channel: channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))


def without_overflow(arguments: Mapping[str, Any]) -> MappingProxyType[str, Any]:
    """Return the arguments of the parked queue as earlier versions declared it."""
    return MappingProxyType({name: value for name, value in arguments.items() if name != "x-overflow"})


async def _declare_queue(connection: BrokerConnection, queue: Queue, done: list[str], faults: list[str]) -> None:
    mismatches: list[str] = []
    await request_one(connection, f"queue {queue.name}", done, mismatches, _queue(queue))
    if mismatches and queue.name == PARKED_QUEUE and "'x-overflow'" in mismatches[0]:
        # Declared by an earlier version. An argument cannot be changed; a policy does the same.
        earlier = Queue(queue.name, without_overflow(queue.arguments))
        mismatches.clear()
        await request_one(connection, f"queue {queue.name}", done, mismatches, _queue(earlier))
        if not mismatches:
            done[-1] += f" ({PARKED_BEFORE})"
    faults += mismatches


def _binding(queue: str, exchange: str, key: str) -> Request:
    return lambda channel: channel.queue_bind(queue, exchange, routing_key=key)


def _exchange_binding(destination: str, source: str, key: str) -> Request:
    return lambda channel: channel.exchange_bind(destination, source, routing_key=key)


async def request_one(
    connection: BrokerConnection,
    what: str,
    done: list[str],
    faults: list[str],
    request: Request,
) -> None:
    """Make one *request*: append *what* to *done*, or its mismatch to *faults*; raise for any other refusal."""
    # One channel per request: the broker closes the channel after a mismatch.
    channel: AmqpChannel = await connection.channel(confirms=False)
    try:
        await request(channel)
    except BROKER_ERRORS as error:
        message = one_line(error)
        if UNKNOWN_TYPE in message:  # RabbitMQ 3 also closes the connection
            faults.append(f"{what}: {PLUGIN_MISSING}; {ENABLE_PLUGIN}")
            return
        if isinstance(error, AMQPChannelError):
            if "inequivalent" not in message:
                raise UnavailableError(f"{what}: RabbitMQ refused: {message}") from error
            faults.append(_describe_mismatch(what, message))
            return
        raise UnavailableError(f"{what}: {one_line(error)}") from error
    else:
        done.append(what)
        await channel.close()


def _describe_mismatch(what: str, complaint: str) -> str:
    """Turn ``inequivalent arg 'x-queue-type' for ...: received 'quorum' but current is 'classic'`` into advice."""
    details = complaint.rpartition("inequivalent arg ")[2]
    return (
        f"{what} exists with other properties: {details}. Drain and delete it, then run closeout topology again; "
        f"or keep it and change closeout's topology."
    )
