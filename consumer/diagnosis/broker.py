"""Checks of the broker with this user, without the management plugin and without sending a message.

Permissions are probed with requests that must be refused: RabbitMQ checks permissions first. A publish with an invalid
expiration and a consumer with an invalid priority end their channel with PRECONDITION_FAILED if the permission exists,
and with ACCESS_REFUSED if not. Each leaves a line in RabbitMQ's log.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from aiormq import spec
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.amqp.intake_topology import topology_for
from consumer.amqp.topology import PARKED_BEFORE, Exchange, Topology, without_overflow
from consumer.contract.names import EVENTS_EXCHANGE, INTERNAL_EXCHANGE, PARKED_QUEUE, consumed_queues
from consumer.diagnosis.check import Check, ok, problem, unreachable, warning
from consumer.diagnosis.queues import Depth, plugin_check, queue_checks, right_to_consume, unused_check
from consumer.diagnosis.refusals import RESPONSE_SECONDS, SILENCE, refusal_of
from consumer.errors import UnavailableError

# 3.10: quorum queues confirm dead letters, so that a retry cannot be lost on its way back.
OLDEST_VERSION = (3, 10)

_POLICY = "import the policy; where it is set, nothing is to be done"
_TOPOLOGY = "run closeout topology as a user with configure permission"


async def examine_broker(connection: BrokerConnection, intake_queues: int = 1) -> list[Check]:
    """Return the checks of the broker at the other end of *connection*; never raises for broker errors."""
    consumed = consumed_queues(intake_queues)
    checks: list[Check] = []
    try:
        channel = await connection.channel(confirms=False)
        checks.append(version_check(str(_properties_of(channel).get("version", "unknown"))))
        topology, depths = await _topology(connection, topology_for(intake_queues))
        checks += [*topology, *queue_checks(depths, consumed)]
        if intake_queues > 1:
            checks.append(await plugin_check(connection))
        checks += await unused_check(connection, intake_queues)
        if readable := [queue for queue in consumed if queue in depths]:
            checks.append(await right_to_consume(connection, readable))
        # Last: in an alarm the broker blocks this connection at the first publish.
        checks += await _rights_to_publish(connection)
    except (UnavailableError, *BROKER_ERRORS) as error:
        checks.append(await unreachable("rabbitmq", error, "AMQP_URL"))
    return checks


def version_check(version: str) -> Check:
    """Check the broker's version; a broker that reports none is accepted."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST_VERSION:
        return problem("rabbitmq", f"version {version}; quorum queues need 3.10 or newer", "upgrade the broker")
    return ok("rabbitmq", f"reachable, version {version}")


def _properties_of(channel: AmqpChannel) -> dict[str, Any]:
    return dict(getattr(channel.connection, "server_properties", None) or {})


async def _topology(connection: BrokerConnection, topology: Topology) -> tuple[list[Check], dict[str, Depth]]:
    """Check that exchanges and queues exist, and their properties if this user may configure."""
    faults: list[str] = []
    unseen = 0
    depths: dict[str, Depth] = {}
    warnings: list[Check] = []
    for exchange in topology.exchanges:
        fault, seen = await _compared(connection, f"exchange {exchange.name}", _exchange(exchange))
        faults += fault
        unseen += not seen
    for queue in topology.queues:
        what = f"queue {queue.name}"
        fault, seen = await _compared(connection, what, _queue(queue.name, queue.arguments, depths))
        if queue.name == PARKED_QUEUE and "'x-overflow'" in "".join(fault):
            # An earlier version declared it so, and an argument cannot be changed. Policies cannot be read over AMQP.
            fault, _ = await _compared(connection, what, _queue(queue.name, without_overflow(queue.arguments), depths))
            if not fault:
                warnings.append(warning("parked limit", f"{PARKED_QUEUE} was declared {PARKED_BEFORE}", _POLICY))
        faults += fault
        unseen += not seen
    if faults:
        return [problem("topology", "; ".join(faults), _TOPOLOGY), *warnings], depths
    message = f"{len(topology.exchanges)} exchanges and {len(topology.queues)} queues exist"
    message += "; only a user with configure permission can compare their properties" if unseen else ", as declared"
    return [ok("topology", message), *warnings], depths


_Declare = Callable[[AmqpChannel, bool], Awaitable[object]]


def _exchange(exchange: Exchange) -> _Declare:
    return lambda channel, passive: channel.exchange_declare(
        exchange.name,
        exchange_type=exchange.type,
        durable=True,
        passive=passive,
        arguments=dict(exchange.arguments),
        timeout=RESPONSE_SECONDS,
    )


def _queue(name: str, arguments: Any, depths: dict[str, Depth]) -> _Declare:  # noqa: ANN401 - AMQP's own table
    async def declare(channel: AmqpChannel, passive: bool) -> None:  # noqa: FBT001 - as _Declare has it
        declared = await channel.queue_declare(
            name, durable=True, arguments=dict(arguments), passive=passive, timeout=RESPONSE_SECONDS
        )
        depths[name] = Depth(declared.message_count or 0, declared.consumer_count or 0)

    return declare


async def _compared(connection: BrokerConnection, what: str, declare: _Declare) -> tuple[list[str], bool]:
    """Return the faults of one exchange or queue, and whether its properties could be compared."""
    if refusal := await refusal_of(connection, lambda channel: declare(channel, True)):
        missing = "NOT_FOUND" in refusal and "no " in refusal
        return [f"{what} is missing" if missing else f"{what}: {refusal}"], True
    # It exists: declaring it only compares.
    refusal = await refusal_of(connection, lambda channel: declare(channel, False))
    if "inequivalent" in refusal:
        return [f"{what} exists with other properties: {refusal.rpartition('inequivalent arg ')[2]}"], True
    return ([], False) if "ACCESS_REFUSED" in refusal else ([refusal] if refusal else [], True)


# Under the names of RabbitMQ's permissions; the last one only replaces the one before it.
_WRITTEN = {
    EVENTS_EXCHANGE: (EVENTS_EXCHANGE, "run.finalized.succeeded"),
    INTERNAL_EXCHANGE: (INTERNAL_EXCHANGE, PARKED_QUEUE),
    "amq.default": ("", f"closeout.{uuid4()}"),
}


async def _rights_to_publish(connection: BrokerConnection) -> list[Check]:
    refusals: dict[str, str] = {}
    for name, (exchange, key) in _WRITTEN.items():
        refusal = SILENCE
        try:
            refusal = await refusal_of(connection, _publish(exchange, key))
        except UnavailableError:  # no channel was opened
            if not await connection.is_blocked():
                raise
        if await connection.is_blocked():
            message = (
                "RabbitMQ is in a memory or disk alarm and accepts no messages; runs are closed out, their events wait"
            )
            return [
                problem(
                    "alarm", message, "free memory or disk on the broker; rabbitmq-diagnostics alarms has the details"
                )
            ]
        if "PRECONDITION_FAILED" not in refusal:
            refusals[name] = refusal
    return [ok("alarm", "none: the broker accepts messages"), _publishing(refusals)]


def _publishing(refusals: dict[str, str]) -> Check:
    stands_in = "amq.default" not in refusals
    missing = {name: why for name, why in refusals.items() if name != "amq.default"}
    message = "; ".join(f"{name}: {why}" for name, why in missing.items())
    absent = all("NOT_FOUND" in why for why in missing.values())
    remedy = _TOPOLOGY if absent else f"grant the worker's user write on {' and '.join(missing)}"
    if EVENTS_EXCHANGE in missing or (missing and not stands_in):
        return problem("publish", message, remedy)
    if missing:
        message += "; until then the worker parks through the default exchange, and can write to every queue"
        return warning("publish", message, f"{remedy}, then revoke amq.default")
    return ok("publish", f"this user can write to {EVENTS_EXCHANGE} and {INTERNAL_EXCHANGE} (parking, retries)")


def _publish(exchange: str, key: str) -> Callable[[AmqpChannel], Awaitable[object]]:
    properties = spec.Basic.Properties(expiration="never", user_id=None)
    return lambda channel: channel.basic_publish(
        b"", exchange=exchange, routing_key=key, mandatory=True, properties=properties, timeout=RESPONSE_SECONDS
    )
