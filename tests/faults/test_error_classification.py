"""``fault_of`` places each error as the real server, and the real client library, give it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
import uvloop
from aiormq import spec
from aiormq.channel import Channel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.closeout.retries import retry_transient
from consumer.contract.names import EVENTS_EXCHANGE, RUN_COMPLETED_KEY, RUN_COMPLETED_QUEUE, RUNS_EXCHANGE
from consumer.errors import Fault, UnavailableError, fault_of, lies_in_data, sqlstate_of
from consumer.postgres.engine import create_engine
from consumer.postgres.readiness import probe
from tests.support.fault_scenario import Scene

pytestmark = pytest.mark.timeout(60)

Errors = Callable[[AsyncEngine, Scene], Awaitable[None]]


@pytest.fixture
async def role_engine(scene: Scene) -> AsyncIterator[AsyncEngine]:
    """The worker's own role, through the proxy."""
    made = create_engine(scene.environ["DATABASE_URL"], pool_size=3)
    yield made
    await made.dispose()


async def _say(conn: AsyncConnection, *statements: str) -> None:
    for statement in statements:
        await conn.execute(text(statement))


async def serialization_failure(engine: AsyncEngine, scene: Scene) -> None:
    await scene.sql("CREATE TABLE governance.t AS SELECT 1 AS x; GRANT ALL ON governance.t TO PUBLIC")
    async with engine.connect() as one:
        await _say(one, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT x FROM governance.t")
        await scene.sql("UPDATE governance.t SET x = 2")
        await _say(one, "UPDATE governance.t SET x = 3")


async def deadlock(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as one, engine.connect() as two:
        await _say(one, "SELECT pg_advisory_xact_lock(1)")
        await _say(two, "SELECT pg_advisory_xact_lock(2)")
        other = asyncio.create_task(_say(one, "SELECT pg_advisory_xact_lock(2)"))
        try:
            await _say(two, "SELECT pg_advisory_xact_lock(1)")
        finally:
            await two.rollback()
            await other


async def statement_timeout(engine: AsyncEngine, _: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "SET LOCAL statement_timeout = '50ms'", "SELECT pg_sleep(5)")


async def lock_timeout(engine: AsyncEngine, _: Scene) -> None:
    async with engine.connect() as one, engine.connect() as two:
        await _say(one, "SELECT pg_advisory_xact_lock(1)")
        await _say(two, "SET LOCAL lock_timeout = '50ms'", "SELECT pg_advisory_xact_lock(1)")


async def idle_in_transaction(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await _say(conn, "SET idle_in_transaction_session_timeout = '50ms'")
        await scene.until(lambda: _is_gone(scene, pid), within=10, what="the end of the session")
        await _say(conn, "SELECT 1")


async def _is_gone(scene: Scene, pid: int) -> bool:
    return await scene.sql(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}") == "0"


async def ended_between_statements(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await scene.sql(f"SELECT pg_terminate_backend({pid}, 10_000)")  # returns once it has ended
        await _say(conn, "SELECT 1")


async def ended_and_the_line_s_end_is_not_seen_yet(engine: AsyncEngine, scene: Scene) -> None:
    """For some microseconds in life: the driver has read that its session is ended, and not yet that the line is."""
    async with engine.connect() as conn:
        driver = (await conn.get_raw_connection()).driver_connection
        assert driver is not None
        (line,) = scene.database_line.lines
        line.silent_end = True
        await scene.sql(f"SELECT pg_terminate_backend({driver.get_server_pid()}, 10_000)")
        await asyncio.wait_for(line.ended.wait(), 10)
        await asyncio.sleep(0.1)  # for the loop to hand it to the driver
        try:
            with pytest.raises(asyncpg.InternalClientError) as caught:
                await driver.fetch("SELECT 1", timeout=5)
        finally:
            line.cut()
        raise caught.value


async def ended_in_a_statement(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        ending = asyncio.get_running_loop().call_later(
            0.2, lambda: asyncio.ensure_future(scene.sql(f"SELECT pg_terminate_backend({pid})"))
        )
        await _say(conn, "SELECT pg_sleep(5)")
        ending.cancel()


async def cancelled_by_an_operator(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        asyncio.get_running_loop().call_later(
            0.2, lambda: asyncio.ensure_future(scene.sql(f"SELECT pg_cancel_backend({pid})"))
        )
        await _say(conn, "SELECT pg_sleep(5)")


async def too_many_connections(engine: AsyncEngine, scene: Scene) -> None:
    await scene.sql(f"ALTER ROLE {scene.role} CONNECTION LIMIT 0")
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def read_only(engine: AsyncEngine, _: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "SET TRANSACTION READ ONLY", "DELETE FROM governance.incidents")


async def undefined_table(engine: AsyncEngine, _: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1 FROM governance.not_yet")


async def undefined_column(engine: AsyncEngine, _: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "SELECT not_yet FROM governance.incidents")


async def no_schema(engine: AsyncEngine, scene: Scene) -> None:
    await scene.sql("ALTER SCHEMA governance RENAME TO elsewhere")
    try:
        async with engine.connect() as conn:
            await _say(conn, "SELECT 1 FROM governance.incidents")
    finally:
        await scene.sql("ALTER SCHEMA elsewhere RENAME TO governance")


async def no_database(_: AsyncEngine, scene: Scene) -> None:
    engine = create_engine(scene.postgres.url("not_there"))
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def no_role(_: AsyncEngine, scene: Scene) -> None:
    engine = create_engine(scene.postgres.url(scene.database, user="nobody_there"))
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def not_permitted(engine: AsyncEngine, _: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "TRUNCATE governance.incidents")


async def line_cut_between_statements(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")
        scene.database_line.cut()
        await asyncio.sleep(0.05)
        await _say(conn, "SELECT 1")


async def line_cut_in_a_statement(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        asyncio.get_running_loop().call_later(0.2, scene.database_line.cut)
        await _say(conn, "SELECT pg_sleep(5)")


async def line_cut_in_the_commit(engine: AsyncEngine, scene: Scene) -> None:
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")
        next(iter(scene.database_line.lines)).doomed = True
        await conn.commit()


async def refused(engine: AsyncEngine, scene: Scene) -> None:
    scene.database_line.refuse()
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def accepted_and_closed(engine: AsyncEngine, scene: Scene) -> None:
    """A load balancer without a database behind it."""
    scene.database_line.breaks = [(0, False)]
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def accepted_and_reset(engine: AsyncEngine, scene: Scene) -> None:
    scene.database_line.breaks = [(0, True)]
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def silent(engine: AsyncEngine, scene: Scene) -> None:
    """The connection is accepted, and nothing ever comes: asyncpg's own time limit for connecting, 5 s."""
    scene.database_line.stall()
    async with engine.connect() as conn:
        await _say(conn, "SELECT 1")


async def pool_exhausted(_: AsyncEngine, scene: Scene) -> None:
    engine = create_engine(scene.environ["DATABASE_URL"], pool_size=1)
    engine.pool._timeout = 0.1  # type: ignore[attr-defined] # 10 s would be long
    try:
        async with engine.connect() as one, engine.connect():
            await _say(one, "SELECT 1")
    finally:  # or whoever collects the garbage closes it, in another test, with a warning
        await engine.dispose()


MOMENTS: list[tuple[Errors, str | None]] = [
    (serialization_failure, "40001"),
    (deadlock, "40P01"),
    (statement_timeout, "57014"),
    (lock_timeout, "55P03"),
    (idle_in_transaction, None),
    (ended_between_statements, None),
    (ended_and_the_line_s_end_is_not_seen_yet, None),
    (ended_in_a_statement, "08003"),  # asyncpg's own; the server's 57P01 comes with the end of the line
    (cancelled_by_an_operator, "57014"),
    (too_many_connections, "53300"),
    (read_only, "25006"),
    (undefined_table, "42P01"),
    (undefined_column, "42703"),
    (no_schema, "42P01"),
    (no_database, "3D000"),
    (no_role, "28000"),
    (not_permitted, "42501"),
    (line_cut_between_statements, None),
    (line_cut_in_a_statement, None),
    (line_cut_in_the_commit, None),
    (refused, None),
    (accepted_and_closed, None),
    (accepted_and_reset, None),
    (silent, None),
    (pool_exhausted, None),
]


@pytest.mark.parametrize(("happens", "state"), MOMENTS, ids=[m[0].__name__ for m in MOMENTS])
async def test_database_errors_are_classified_as_transient(scene: Scene, role_engine: AsyncEngine, happens, state):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is looked at
        await happens(role_engine, scene)
    assert fault_of(caught.value) is Fault.TRANSIENT, repr(caught.value)
    assert not lies_in_data(caught.value)
    if state is not None:
        assert sqlstate_of(caught.value) == state, repr(caught.value)


@pytest.mark.parametrize(
    ("statement", "state"),
    [
        ("INSERT INTO governance.rollbacks SELECT NULL", "23502"),
        ("INSERT INTO governance.t VALUES (1), (1)", "23505"),
        ("INSERT INTO governance.t VALUES (-1)", "23514"),
        ("SELECT 1 / 0", "22012"),
        ("SELECT 'x'::uuid", "22P02"),
        ("SELECT nothing()", "42883"),
        ("SELEC", "42601"),
        ("DO $$ BEGIN RAISE EXCEPTION 'a trigger says no'; END $$", "P0001"),
    ],
)
async def test_errors_in_data_or_code_are_classified_as_unknown_and_isolated(
    scene: Scene, role_engine: AsyncEngine, statement: str, state: str
):
    await scene.sql("CREATE TABLE governance.t (x int PRIMARY KEY CHECK (x > 0)); GRANT ALL ON governance.t TO PUBLIC")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is looked at
        async with role_engine.connect() as conn:
            await _say(conn, statement)
    assert (sqlstate_of(caught.value), fault_of(caught.value)) == (state, Fault.UNKNOWN)
    assert lies_in_data(caught.value)


async def test_an_engine_recovers_after_each_kind_of_lost_connection(scene: Scene, role_engine: AsyncEngine):
    for happens in (line_cut_in_a_statement, line_cut_between_statements, ended_in_a_statement):
        with pytest.raises(Exception):  # noqa: B017, PT011 - which one is the other tests' business
            await happens(role_engine, scene)
        await retry_transient(lambda: probe(role_engine))


# RabbitMQ


@pytest.fixture
async def connection(scene: Scene) -> AsyncIterator[BrokerConnection]:
    """The worker's own user, through the proxy."""
    made = BrokerConnection(scene.environ["AMQP_URL"], name="real errors")
    yield made
    await made.close()


async def _publish(connection: BrokerConnection, exchange: str, **properties: Any) -> None:
    channel = await connection.channel(confirms=True)
    await channel.basic_publish(
        b"x", exchange=exchange, routing_key="x", properties=spec.Basic.Properties(**properties), timeout=3, wait=False
    )


async def no_exchange_404(connection: BrokerConnection, _: Scene) -> None:
    await _publish(connection, "not.there")


async def no_queue_404(connection: BrokerConnection, _: Scene) -> None:
    channel = await connection.channel(confirms=False)
    await channel.basic_consume("not.there", lambda _message: asyncio.sleep(0))


async def no_right_403(connection: BrokerConnection, scene: Scene) -> None:
    await scene.aside(scene.rabbit.permit, scene.user, scene.vhost, "^$", "^$", ".*")
    await _publish(connection, EVENTS_EXCHANGE)


async def no_right_to_configure_403(connection: BrokerConnection, _: Scene) -> None:
    channel = await connection.channel(confirms=False)
    await channel.queue_declare("mine")


async def wrong_user_406(connection: BrokerConnection, _: Scene) -> None:
    await _publish(connection, EVENTS_EXCHANGE, user_id="somebody-else")


async def unknown_tag_406(connection: BrokerConnection, _: Scene) -> None:
    channel = await connection.channel(confirms=False)
    await channel.basic_ack(4711, wait=False)
    await _ends(channel)


async def connection_forced(connection: BrokerConnection, scene: Scene) -> None:
    channel = await connection.channel(confirms=True)
    await scene.aside(scene.rabbit.eval, 'rabbit_networking:close_all_connections(<<"maintenance">>)')
    await asyncio.sleep(0.1)
    await channel.basic_publish(b"x", exchange=EVENTS_EXCHANGE, routing_key="x", timeout=3)


async def wrong_password(_: BrokerConnection, scene: Scene) -> None:
    await BrokerConnection(scene.environ["AMQP_URL"].replace(":pw@", ":no@"), name="x").channel(confirms=False)


async def no_vhost(_: BrokerConnection, scene: Scene) -> None:
    await BrokerConnection(scene.rabbit.url("not-there"), name="x").channel(confirms=False)


async def broker_refuses(connection: BrokerConnection, scene: Scene) -> None:
    scene.broker_line.refuse()
    await connection.channel(confirms=False)


async def broker_silent(connection: BrokerConnection, scene: Scene) -> None:
    """Accepted, and nothing ever comes: our own time limit for opening, 10 s."""
    scene.broker_line.stall()
    await connection.channel(confirms=False)


async def closed_in_the_handshake(connection: BrokerConnection, scene: Scene) -> None:
    scene.broker_line.breaks = [(0, False)]
    await connection.channel(confirms=False)


async def closed_before_the_handshake(connection: BrokerConnection, scene: Scene) -> None:
    """A load balancer, or a listener, without a broker behind it."""
    scene.broker_line.targets = [1]
    await connection.channel(confirms=False)


async def reset_in_the_handshake(connection: BrokerConnection, scene: Scene) -> None:
    scene.broker_line.breaks = [(1, True)]
    await connection.channel(confirms=False)


async def cut_while_waiting_for_a_confirm(connection: BrokerConnection, scene: Scene) -> None:
    confirmed = ConfirmedChannel(connection)
    await confirmed.opened()
    scene.broker_line.stall()
    asyncio.get_running_loop().call_later(0.2, scene.broker_line.cut)
    await confirmed.send(
        exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=b"x", properties=spec.Basic.Properties()
    )


async def confirm_never_comes(connection: BrokerConnection, scene: Scene) -> None:
    """Our own time limit for a confirm, 10 s."""
    confirmed = ConfirmedChannel(connection)
    await confirmed.opened()
    scene.broker_line.stall()
    await confirmed.send(
        exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=b"x", properties=spec.Basic.Properties()
    )


async def cut_while_waiting_for_an_answer(connection: BrokerConnection, scene: Scene) -> None:
    channel = await connection.channel(confirms=False)
    scene.broker_line.stall()
    asyncio.get_running_loop().call_later(0.2, scene.broker_line.cut)
    await channel.basic_qos(prefetch_count=1, timeout=5)


async def published_in_an_alarm(connection: BrokerConnection, scene: Scene) -> None:
    confirmed = ConfirmedChannel(connection)
    try:
        await scene.aside(scene.rabbit.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.00001)")
        for _ in range(2):  # the broker says "blocked" to whom publishes
            await confirmed.send(
                exchange=RUNS_EXCHANGE, routing_key=RUN_COMPLETED_KEY, body=b"x", properties=spec.Basic.Properties()
            )
    finally:
        await scene.aside(scene.rabbit.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.6)")


async def channel_used_after_its_end(connection: BrokerConnection, _: Scene) -> None:
    channel = await connection.channel(confirms=False)
    await channel.close()
    await channel.basic_publish(b"x", exchange=EVENTS_EXCHANGE, routing_key="x")


async def not_routed(connection: BrokerConnection, _: Scene) -> None:
    await ConfirmedChannel(connection).send(
        exchange=RUNS_EXCHANGE, routing_key="nobody.listens", body=b"x", properties=spec.Basic.Properties()
    )


BROKER = [
    no_exchange_404, no_queue_404, no_right_403, no_right_to_configure_403, wrong_user_406, unknown_tag_406,
    connection_forced, wrong_password, no_vhost, broker_refuses, broker_silent, closed_in_the_handshake,
    closed_before_the_handshake,
    reset_in_the_handshake, cut_while_waiting_for_a_confirm, confirm_never_comes, cut_while_waiting_for_an_answer,
    published_in_an_alarm, channel_used_after_its_end, not_routed,
]  # fmt: skip


@pytest.mark.parametrize("happens", BROKER, ids=[b.__name__ for b in BROKER])
async def test_broker_errors_are_classified_as_transient(scene: Scene, connection: BrokerConnection, happens):
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - CancelledError would be the worst of all
        await happens(connection, scene)
    assert isinstance(caught.value, (*BROKER_ERRORS, UnavailableError)), repr(caught.value)
    assert fault_of(caught.value) is Fault.TRANSIENT, repr(caught.value)


async def _ends(channel: Channel) -> None:
    """Raise what *channel* is closed with. A channel that stays open is no weather, as a TimeoutError would be."""
    done, _ = await asyncio.wait([channel.closing], timeout=10)
    assert done, "nothing closed the channel"
    await channel.closing


# start, tune, open-ok; the channel's open-ok, qos-ok, consume-ok: behind each of them, and before the first.
@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("answers", range(6))
async def test_a_connection_lost_after_any_response_is_a_transient_error_for_a_consumer(
    scene: Scene, connection: BrokerConnection, answers: int, how: str
):
    """No CancelledError, no StopAsyncIteration: they would end the worker, or count an attempt."""
    scene.broker_line.breaks = [(answers, how == "reset")]

    async def consume() -> None:
        channel = await connection.channel(confirms=False)
        await channel.basic_qos(prefetch_count=1, timeout=5)
        await channel.basic_consume(RUN_COMPLETED_QUEUE, lambda _message: asyncio.sleep(0), timeout=5)
        await _ends(channel)

    with pytest.raises((UnavailableError, *BROKER_ERRORS)):
        await consume()


async def test_a_listener_without_a_broker_behind_it_is_a_transient_error_in_a_worker(scene: Scene):
    """A load balancer in front of a broker that is down. uvloop sees the end of the line before aiormq reads it."""
    scene.broker_line.targets = [1]

    async def connect() -> list[BaseException]:
        found: list[BaseException] = []
        for _ in range(20):
            try:
                await BrokerConnection(scene.environ["AMQP_URL"], name="x").channel(confirms=False)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is what is looked at
                found.append(error)
        return found

    found = await asyncio.to_thread(uvloop.run, connect())
    assert len(found) == 20
    assert {type(error) for error in found} == {UnavailableError}
