"""The topology with several intake queues, and the move from one number of queues to another.

``closeout topology`` first adds bindings, then removes those that are no longer needed. In between, a run may go to two
queues, and the second delivery is a duplicate. It never goes to none.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import ChannelNotFoundEntity

from config.settings import INTAKE_QUEUES_MAX
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.amqp.topology import TOPOLOGY, Exchange, Topology, declare, intake_queue, request_one
from consumer.contract.names import (
    INTAKE_EXCHANGE,
    RUN_COMPLETED_KEY,
    RUN_COMPLETED_QUEUE,
    RUNS_EXCHANGE,
    numbered_queues,
)
from consumer.errors import UnavailableError, one_line
from consumer.wording import counted

HASH_TYPE = "x-consistent-hash"
# The routing key of a binding to a hash exchange is the queue's weight.
_WEIGHT = "1"
# Seconds until a message that was routed just before a binding was removed is in its queue.
_ROUTED_SECONDS = 1.0
_ALL_NUMBERED = numbered_queues(INTAKE_QUEUES_MAX)


def topology_for(intake_queues: int) -> Topology:
    """Return the topology with this number of intake queues.

    With several, ``closeout.run-completed`` remains as the queue to which retries return: a retry queue's target cannot
    be changed.
    """
    queues = numbered_queues(intake_queues)
    if not queues:
        return TOPOLOGY
    own = (RUN_COMPLETED_QUEUE, RUNS_EXCHANGE, RUN_COMPLETED_KEY)
    return replace(
        TOPOLOGY,
        # By message id: the routing key is the same for every run.
        exchanges=(
            *TOPOLOGY.exchanges,
            Exchange(INTAKE_EXCHANGE, HASH_TYPE, MappingProxyType({"hash-property": "message_id"})),
        ),
        queues=(*TOPOLOGY.queues, *(intake_queue(queue, queue_leader_locator="balanced") for queue in queues)),
        bindings=(
            *(binding for binding in TOPOLOGY.bindings if binding != own),
            *((queue, INTAKE_EXCHANGE, _WEIGHT) for queue in queues),
        ),
        exchange_bindings=((INTAKE_EXCHANGE, RUNS_EXCHANGE, RUN_COMPLETED_KEY),),
    )


class UnusedQueue(NamedTuple):
    """An intake queue that no run goes to any more."""

    name: str
    messages: int
    consumers: int

    @property
    def is_idle(self) -> bool:
        """Return whether it has neither a message nor a consumer, which may hold one."""
        return not self.messages and not self.consumers

    def __str__(self) -> str:
        return f"{self.name}: {counted(self.messages, 'message')}, {counted(self.consumers, 'consumer')}"


@dataclass(slots=True)
class Moved:
    """What :func:`move` did: objects that exist, objects that are gone, and queues that are not used any more."""

    declared: list[str]
    removed: list[str] = field(default_factory=list)
    unused: list[UnusedQueue] = field(default_factory=list)


async def move(connection: BrokerConnection, intake_queues: int, *, delete_unused: bool = False) -> Moved:
    """Declare the topology, then remove the bindings to all other intake queues; safe to repeat.

    With *delete_unused*, also delete those queues, from the last to the first that has a message or a consumer. Raises
    as :func:`declare` does.
    """
    moved = Moved(await declare(connection, topology_for(intake_queues)))
    if intake_queues == 1 and await _count(connection, _exchange_exists) is None:
        return moved  # there were never several
    await _unbind(connection, intake_queues, moved.removed)
    if delete_unused:
        await asyncio.sleep(_ROUTED_SECONDS)
    moved.unused = await unused_queues(connection, intake_queues)
    while delete_unused and moved.unused and moved.unused[-1].is_idle:
        queue = moved.unused.pop().name
        await request_one(connection, f"queue {queue}", moved.removed, [], partial(_delete_queue, queue))
    if delete_unused and intake_queues == 1 and not moved.unused:
        await request_one(connection, f"exchange {INTAKE_EXCHANGE}", moved.removed, [], _delete_intake_exchange)
    return moved


async def _unbind(connection: BrokerConnection, intake_queues: int, removed: list[str]) -> None:
    # Removing a binding that does not exist is not an error.
    target = RUN_COMPLETED_QUEUE if intake_queues > 1 else INTAKE_EXCHANGE

    async def unbind_target(channel: AmqpChannel) -> None:
        if target == INTAKE_EXCHANGE:
            await channel.exchange_unbind(INTAKE_EXCHANGE, RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY)
        else:
            await channel.queue_unbind(RUN_COMPLETED_QUEUE, RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY)

    async def unbind_others(channel: AmqpChannel) -> None:
        for queue in _others(intake_queues):
            await channel.queue_unbind(queue, INTAKE_EXCHANGE, routing_key=_WEIGHT)

    what = f"binding {RUNS_EXCHANGE} --{RUN_COMPLETED_KEY}--> {target}"
    await request_one(connection, what, removed, [], unbind_target)
    await request_one(connection, f"bindings of {INTAKE_EXCHANGE} to other queues", [], [], unbind_others)


async def unused_queues(connection: BrokerConnection, intake_queues: int) -> list[UnusedQueue]:
    """Return the numbered queues that exist and are not among *intake_queues*; they are numbered without a gap."""
    found: list[UnusedQueue] = []
    for queue in _others(intake_queues):
        counts = await _count(connection, partial(_queue_counts, queue))
        if counts is None:
            break
        found.append(UnusedQueue(queue, *counts))
    return found


def _others(intake_queues: int) -> tuple[str, ...]:
    """Return the names of all numbered queues that are not among *intake_queues*."""
    return _ALL_NUMBERED[len(numbered_queues(intake_queues)) :]


async def _count(
    connection: BrokerConnection, request: Callable[[AmqpChannel], Awaitable[tuple[int, int]]]
) -> tuple[int, int] | None:
    """Return the messages and consumers that *request* counts; ``None`` if its object does not exist."""
    channel = await connection.channel(confirms=False)
    try:
        found = await request(channel)
    except ChannelNotFoundEntity:
        return None
    except BROKER_ERRORS as error:
        raise UnavailableError(f"RabbitMQ is not available: {one_line(error)}") from error
    await channel.close()
    return found


async def _exchange_exists(channel: AmqpChannel) -> tuple[int, int]:
    await channel.exchange_declare(INTAKE_EXCHANGE, passive=True)
    return 0, 0


async def _queue_counts(queue: str, channel: AmqpChannel) -> tuple[int, int]:
    declared = await channel.queue_declare(queue, passive=True)
    return declared.message_count or 0, declared.consumer_count or 0


async def _delete_queue(queue: str, channel: AmqpChannel) -> None:
    await channel.queue_delete(queue)  # quorum queues support neither if-empty nor if-unused


async def _delete_intake_exchange(channel: AmqpChannel) -> None:
    await channel.exchange_delete(INTAKE_EXCHANGE, if_unused=True)
