"""RabbitMQ's users of ``deploy/rabbitmq/definitions.json``, on both major versions: exactly their permissions."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiormq import spec
from aiormq.channel import Channel as AmqpChannel
from aiormq.exceptions import AMQPChannelError
from servers import RabbitServer

from consumer.amqp.batch_publish import why_closed
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import TOPOLOGY, Topology, declare
from consumer.contract.names import (
    EVENTS_EXCHANGE,
    INTERNAL_EXCHANGE,
    PARKED_QUEUE,
    RETRY_QUEUE,
    RUN_COMPLETED_QUEUE,
    RUNS_EXCHANGE,
)
from consumer.errors import UnavailableError
from consumer.parked.copies import headers_of
from tests.support import roles, traffic
from tests.support import run_messages as runs

Operation = Callable[[AmqpChannel], Awaitable[object]]
QUEUES = [RUN_COMPLETED_QUEUE, PARKED_QUEUE, RETRY_QUEUE]
EXCHANGES = [RUNS_EXCHANGE, EVENTS_EXCHANGE, INTERNAL_EXCHANGE, "", "amq.direct", "amq.topic", "amq.fanout", "others"]
_names = itertools.count()


async def never(_message: object) -> None:
    """A callback of a consumer that is never started."""


def of_queue(queue: str) -> dict[str, Operation]:
    """Return every operation of a client on *queue*."""
    return {
        f"consume {queue}": lambda channel: channel.basic_consume(queue, never),
        f"get {queue}": lambda channel: channel.basic_get(queue),
        f"purge {queue}": lambda channel: channel.queue_purge(queue),
        f"delete {queue}": lambda channel: channel.queue_delete(queue, if_unused=False, if_empty=False),
        f"declare {queue}": lambda channel: channel.queue_declare(queue, durable=True),
        f"bind {queue} to events": lambda channel: channel.queue_bind(queue, EVENTS_EXCHANGE, routing_key="#"),
        f"unbind {queue} from runs": lambda channel: channel.queue_unbind(queue, RUNS_EXCHANGE, routing_key="x"),
    }


def of_exchange(exchange: str) -> dict[str, Operation]:
    """Return every operation of a client on *exchange*; the default one can be neither deleted nor bound."""
    requests: dict[str, Operation] = {}
    if exchange:
        requests[f"delete {exchange}"] = lambda channel: channel.exchange_delete(exchange)
        requests[f"bind {exchange}"] = lambda channel: channel.exchange_bind(exchange, "amq.fanout", routing_key="#")
    return requests | {
        f"publish {exchange or 'amq.default'} {key}": publishing(exchange, key)
        for key in ("run.completed", "run.finalized.succeeded", PARKED_QUEUE)
    }


def publishing(exchange: str, key: str) -> Operation:
    return lambda channel: channel.basic_publish(b"{}", exchange=exchange, routing_key=key)


def everything() -> dict[str, Operation]:
    """Return, by name, every operation that a client can attempt on each queue and exchange of these tests."""
    requests: dict[str, Operation] = {
        "declare a queue": lambda channel: channel.queue_declare("mine"),
        "declare a queue without a name": lambda channel: channel.queue_declare("", exclusive=True),
        "declare an exchange": lambda channel: channel.exchange_declare("mine", exchange_type="fanout"),
    }
    for queue in [*QUEUES, "subscriber.theirs"]:
        requests |= of_queue(queue)
    for exchange in EXCHANGES:
        requests |= of_exchange(exchange)
    return requests


# The permissions of each user; everything else is refused. RabbitMQ permits purging a queue with permission to read it.
MAY = {
    roles.WORKER_USER: [
        *(f"{verb} {RUN_COMPLETED_QUEUE}" for verb in ("consume", "get", "purge")),
        f"publish {EVENTS_EXCHANGE} run.finalized.succeeded",
        *(f"publish {INTERNAL_EXCHANGE} {key}" for key in ("run.completed", "run.finalized.succeeded", PARKED_QUEUE)),
    ],
    roles.RUNNER_USER: [f"publish {RUNS_EXCHANGE} run.completed"],
    roles.OPERATOR_USER: [
        *(f"{verb} {PARKED_QUEUE}" for verb in ("consume", "get", "purge")),
        *(f"publish {RUNS_EXCHANGE} {key}" for key in ("run.completed", "run.finalized.succeeded", PARKED_QUEUE)),
        f"publish {EVENTS_EXCHANGE} run.finalized.succeeded",
    ],
    roles.SUBSCRIBER_USER: [
        *(f"{verb} subscriber.theirs" for verb in ("consume", "get", "purge", "delete", "declare")),
        "bind subscriber.theirs to events",
    ],
}


class Place:
    """A vhost into which the definitions were imported, and its users."""

    def __init__(self, server: RabbitServer, vhost: str) -> None:
        self.server, self.vhost, self.url = server, vhost, server.url(vhost)

    async def set_up(self, folder: Path) -> None:
        self.import_definitions(folder)
        self.set_passwords()
        # Of another application; of our users only a subscriber may access it.
        admin = BrokerConnection(self.url, name="tests")
        channel = await admin.channel(confirms=False)
        await channel.queue_declare("subscriber.theirs", durable=True)
        await channel.exchange_declare("others", exchange_type="topic")
        await admin.close()

    def import_definitions(self, folder: Path) -> None:
        """Import the shipped definitions under this vhost's name."""
        named = json.loads(json.dumps(roles.DEFINITIONS))
        for kind in named.values():
            for entry in kind:
                if "vhost" in entry:
                    entry["vhost"] = self.vhost
        named["vhosts"] = [{"name": self.vhost}]
        file = folder / "definitions.json"
        file.write_text(json.dumps(named))
        self.server.ctl("import_definitions", str(file))
        self.server.permit("closeout", self.vhost, ".*", ".*", ".*")

    def set_passwords(self) -> None:
        for user in roles.DEFINITIONS["users"]:
            self.server.set_password(user["name"], roles.PASSWORD)

    def url_of(self, user: str) -> str:
        return roles.as_user(self.url, user)

    def existing(self) -> list[str]:
        """Return the existing exchanges, queues and bindings with all properties, except the tests' own."""
        names = "name, durable, auto_delete, arguments"
        output = self.server.eval(
            f'V = <<"{self.vhost}">>, All = rabbit_exchange:info_all(V, [{names}, type, internal])'
            f" ++ rabbit_amqqueue:info_all(V, [{names}]) ++ rabbit_binding:list(V),"
            # A client and an import write tables in different orders, and numbers in different AMQP types.
            "Same = fun({arguments, T}) -> lists:sort([{Key, Value} || {Key, _, Value} <- T]); (Else) -> Else end,"
            "Plain = fun(One) when is_list(One) -> lists:map(Same, One); (One) -> One end,"
            'lists:flatten([io_lib:format("~0p|", [One]) || One <- lists:sort(lists:map(Plain, All))])'
        )
        lines = output.replace(self.vhost, "VHOST").strip('"').split("|")
        return [line for line in lines if "subscriber." not in line and "others" not in line]

    async def may(self, user: str, operation: Operation) -> bool:
        """Return whether *user* is permitted; the broker checks permissions before anything else."""
        connection = BrokerConnection(self.url_of(user), name="tests")
        channel = await connection.channel(confirms=True)
        try:
            await operation(channel)
        except AMQPChannelError as error:
            return "ACCESS_REFUSED" not in str(error)
        except asyncio.CancelledError:
            return "ACCESS_REFUSED" not in str(await why_closed(channel, within=5))
        finally:
            await connection.close()
        return True


@pytest.fixture(scope="module")
def imported() -> dict[str, Place]:
    """The vhosts by the version of their server: one import is enough for all tests here."""
    return {}


@pytest.fixture
async def place(any_rabbit: RabbitServer, imported: dict[str, Place], tmp_path: Path) -> Place:
    if any_rabbit.version not in imported:
        made = Place(any_rabbit, "imported")
        await made.set_up(tmp_path)
        imported[any_rabbit.version] = made
    return imported[any_rabbit.version]


async def test_an_imported_user_can_log_in_only_after_a_password_is_set(any_rabbit, tmp_path):
    place = Place(any_rabbit, "locked")
    place.import_definitions(tmp_path)

    for password in ("", roles.PASSWORD):
        locked = BrokerConnection(any_rabbit.url("locked", user=roles.WORKER_USER, password=password), name="tests")
        with pytest.raises(UnavailableError, match="ACCESS_REFUSED"):
            await locked.channel(confirms=False)
        await locked.close()
    place.set_passwords()
    unlocked = BrokerConnection(place.url_of(roles.WORKER_USER), name="tests")
    await unlocked.channel(confirms=False)
    await unlocked.close()
    any_rabbit.delete_vhost("locked")


async def test_closeout_topology_accepts_the_imported_definitions(place):
    connection = BrokerConnection(place.url_of(roles.TOPOLOGY_USER), name="tests")
    before = place.existing()

    declared = await declare(connection)
    await connection.close()

    assert len(declared) == len(TOPOLOGY.exchanges) + len(TOPOLOGY.queues) + len(TOPOLOGY.bindings)
    assert place.existing() == before


async def test_the_topology_user_declares_the_imported_definitions_in_an_empty_vhost(place):
    bare = Place(place.server, "bare")
    place.server.create_vhost(bare.vhost)
    roles.permit(place.server, bare.vhost, roles.TOPOLOGY_USER)
    connection = BrokerConnection(bare.url_of(roles.TOPOLOGY_USER), name="tests")

    await declare(connection)
    await connection.close()

    assert bare.existing() == place.existing()
    place.server.delete_vhost(bare.vhost)


@pytest.mark.parametrize("user", MAY)
async def test_each_user_has_exactly_its_permissions(place, user):
    allowed = [what for what, operation in everything().items() if await place.may(user, operation)]

    assert sorted(allowed) == sorted(MAY[user])


async def test_no_user_can_access_another_vhost(place):
    place.server.create_vhost("elsewhere")
    for user in MAY:
        elsewhere = BrokerConnection(place.server.url("elsewhere", user=user, password=roles.PASSWORD), name="tests")
        with pytest.raises(UnavailableError):
            await elsewhere.channel(confirms=False)
        await elsewhere.close()
    place.server.delete_vhost("elsewhere")


async def test_a_policy_for_all_queues_does_not_apply_to_ours(place):
    vhost = f'<<"{place.vhost}">>'
    place.server.eval(
        f'rabbit_policy:set({vhost}, <<"all">>, <<".*">>, [{{<<"max-length">>, 1}}], 50, <<"queues">>, <<"tests">>)'
    )
    output = place.server.eval(
        'lists:flatten([io_lib:format("~s=~s|", [element(4, amqqueue:get_name(Q)), rabbit_policy:name(Q)])'
        f" || Q <- rabbit_amqqueue:list({vhost})])"
    )
    place.server.eval(f'rabbit_policy:delete({vhost}, <<"all">>, <<"tests">>)')

    assert dict(pair.split("=") for pair in output.strip('"|').split("|")) == {
        **dict.fromkeys(QUEUES, "closeout"),
        "subscriber.theirs": "all",
    }


async def test_a_worker_needs_only_its_own_user_and_role(place, database_url, engine):
    admin = BrokerConnection(place.url, name="tests")
    channel = await admin.channel(confirms=False)
    for queue in QUEUES:  # messages of other tests
        await channel.queue_purge(queue)
    events = await traffic.listen(admin)
    runner = BrokerConnection(place.url_of(roles.RUNNER_USER), name="runner")
    async with traffic.worker(database_url, place.url):
        await traffic.publish(runner, runs.body(), b"{broken")
        await traffic.eventually(engine, traffic.published_runs(), 1)
        (parked,) = await traffic.parked(admin, 1)

    assert headers_of(parked)["x-closeout-reason"] == "invalid_json"
    assert (parked.exchange, parked.routing_key) == (INTERNAL_EXCHANGE, PARKED_QUEUE)
    assert len(await traffic.received(events, 3)) == 3
    await runner.close()
    await admin.close()


@pytest.mark.parametrize("write", [r"^amq\.default$", r"^closeout\.internal$"])
async def test_copies_are_published_by_the_route_that_the_permissions_allow(place, write):
    """Permissions and workers do not change together: older permissions allow one route, newer ones the other."""
    url = place.server.add_user(f"changing{next(_names)}", "pw", "^$", write, "^$", place.vhost)
    other = r"^closeout\.internal$" if "amq" in write else r"^amq\.default$"
    connection = BrokerConnection(url, name="tests")
    admin = BrokerConnection(place.url, name="tests")
    channel = ConfirmedChannel(connection)
    for pattern in (write, other):
        place.server.permit(str(connection.user), place.vhost, "^$", pattern, "^$")
        await (await channel.opened()).close()  # an open one caches its permissions
        for _ in range(2):
            await channel.send_to_queue(PARKED_QUEUE, body=b"{}", properties=spec.Basic.Properties())
    place.server.permit(str(connection.user), place.vhost, "^$", "^$", "^$")
    await (await channel.opened()).close()
    with pytest.raises(UnavailableError, match=r"closeout\.internal.*amq\.default|amq\.default.*closeout\.internal"):
        await channel.send_to_queue(PARKED_QUEUE, body=b"{}", properties=spec.Basic.Properties())

    assert len(await traffic.parked(admin, 4)) == 4
    await connection.close()
    await admin.close()


async def test_a_newer_worker_parks_copies_on_an_older_topology(any_rabbit):
    vhost = f"older{next(_names)}"
    admin = BrokerConnection(any_rabbit.create_vhost(vhost), name="tests")
    await declare(admin, Topology(exchanges=(), queues=TOPOLOGY.queues))
    channel = ConfirmedChannel(admin)

    await channel.send_to_queue(PARKED_QUEUE, body=b"{}", properties=spec.Basic.Properties())

    (parked,) = await traffic.parked(admin, 1)
    assert parked.exchange == ""
    await admin.close()
    any_rabbit.delete_vhost(vhost)
