"""Checks of the worker's queues: their depths, their consumers, and what several intake queues need."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.intake_topology import HASH_TYPE, unused_queues
from consumer.amqp.topology import ENABLE_PLUGIN, PLUGIN_MISSING, UNKNOWN_TYPE
from consumer.contract.names import PARKED_QUEUE, RETRY_QUEUE
from consumer.diagnosis.check import Check, ok, problem, warning
from consumer.diagnosis.refusals import RESPONSE_SECONDS, refusal_of
from consumer.wording import counted

# Messages. A worker closes out about a thousand runs per second: more than this takes at least ten seconds.
_BACKLOG = 10_000
# Reserved for the broker: a declaration that the broker refuses for every user, after it checked the type.
_RESERVED_EXCHANGE = "amq.closeout"


class Depth(NamedTuple):
    """Messages ready in a queue, and its consumers."""

    ready: int
    consumers: int


def queue_checks(depths: Mapping[str, Depth], consumed: Sequence[str]) -> list[Check]:
    """Return the checks of the queues that exist; *consumed*: those that a worker consumes."""
    checks: list[Check] = []
    if runs := {queue: depths[queue] for queue in consumed if queue in depths}:
        checks.append(_consumers(runs))
    if retries := depths.get(RETRY_QUEUE):
        message = f"{counted(retries.ready, 'message')} in the retry queue"
        remedy = "these runs fail repeatedly: see the worker's log, or governance.rollbacks"
        checks.append(warning("retries", message, remedy) if retries.ready else ok("retries", message))
    if parked := depths.get(PARKED_QUEUE):
        message = f"{counted(parked.ready, 'message')} in {PARKED_QUEUE}"
        remedy = "run closeout parked list for the reasons, fix the cause, then run closeout parked replay"
        checks.append(warning("parked", message, remedy) if parked.ready else ok("parked", message))
    return checks


def _consumers(runs: Mapping[str, Depth]) -> Check:
    idle = {queue: depth for queue, depth in runs.items() if not depth.consumers}
    ready = sum(depth.ready for depth in runs.values())
    message = "; ".join(
        f"{counted(depth.ready, 'message')} ready in {queue}, {counted(depth.consumers, 'consumer')}"
        for queue, depth in (idle or runs).items()
    )
    if idle:
        kind = problem if any(depth.ready for depth in idle.values()) else warning
        return kind("consumers", message, "start a worker; if one is running, /readyz has the reason")
    if ready > _BACKLOG:
        return warning("consumers", message, "runs arrive faster than they are closed out: add workers")
    return ok("consumers", message)


async def plugin_check(connection: BrokerConnection) -> Check:
    """Check that the broker has the exchange type that several intake queues need."""

    async def declare(channel: AmqpChannel) -> None:
        await channel.exchange_declare(
            _RESERVED_EXCHANGE, exchange_type=HASH_TYPE, durable=True, timeout=RESPONSE_SECONDS
        )

    if UNKNOWN_TYPE in await refusal_of(connection, declare):
        return problem("plugin", PLUGIN_MISSING, ENABLE_PLUGIN)
    return ok("plugin", f"the exchange type {HASH_TYPE} is available")


async def unused_check(connection: BrokerConnection, intake_queues: int) -> list[Check]:
    """Check that no intake queue of another ``INTAKE_QUEUES`` is left; no check if none is."""
    unused = await unused_queues(connection, intake_queues)
    if not unused:
        return []
    message = f"{'; '.join(map(str, unused))}; INTAKE_QUEUES is {intake_queues}"
    if any(queue.messages and not queue.consumers for queue in unused):
        remedy = "run a worker with the INTAKE_QUEUES for which it was declared until it is empty"
        return [problem("unused", message, remedy)]
    return [warning("unused", message, "once it is empty and has no consumers, run closeout topology --delete-unused")]


async def right_to_consume(connection: BrokerConnection, queues: Sequence[str]) -> Check:
    """Check that this user can read *queues*, without consuming any."""
    refusals: dict[str, str] = {}
    for queue in queues:
        refusal = await refusal_of(connection, partial(_consume_with_invalid_priority, queue))
        if "PRECONDITION_FAILED" not in refusal:
            refusals[queue] = refusal
    if not refusals:
        return ok("consume", f"this user can read {', '.join(queues)}")
    return problem("consume", "; ".join(refusals.values()), f"grant the worker's user read on {', '.join(refusals)}")


async def _consume_with_invalid_priority(queue: str, channel: AmqpChannel) -> None:
    await channel.basic_consume(queue, _never, arguments={"x-priority": "none"}, timeout=RESPONSE_SECONDS)


async def _never(_message: object) -> None:
    """Do nothing: the consumer is never created."""
