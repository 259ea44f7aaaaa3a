"""The failures of a statement on a real PostgreSQL, each as a function that provokes it."""

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.postgres.engine import create_engine
from tests.support.faults.scenario import Scenario

Errors = Callable[[AsyncEngine, Scenario], Awaitable[None]]


async def execute(conn: AsyncConnection, *statements: str) -> None:
    for statement in statements:
        await conn.execute(text(statement))


async def serialization_failure(engine: AsyncEngine, scenario: Scenario) -> None:
    await scenario.sql("CREATE TABLE governance.t AS SELECT 1 AS x; GRANT ALL ON governance.t TO PUBLIC")
    async with engine.connect() as one:
        await execute(one, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT x FROM governance.t")
        await scenario.sql("UPDATE governance.t SET x = 2")
        await execute(one, "UPDATE governance.t SET x = 3")


async def deadlock(engine: AsyncEngine, scenario: Scenario) -> None:
    async with engine.connect() as one, engine.connect() as two:
        await execute(one, "SELECT pg_advisory_xact_lock(1)")
        await execute(two, "SELECT pg_advisory_xact_lock(2)")
        other = asyncio.create_task(execute(one, "SELECT pg_advisory_xact_lock(2)"))
        try:
            await execute(two, "SELECT pg_advisory_xact_lock(1)")
        finally:
            await two.rollback()
            await other


async def statement_timeout(engine: AsyncEngine, _: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "SET LOCAL statement_timeout = '50ms'", "SELECT pg_sleep(5)")


async def lock_timeout(engine: AsyncEngine, _: Scenario) -> None:
    async with engine.connect() as one, engine.connect() as two:
        await execute(one, "SELECT pg_advisory_xact_lock(1)")
        await execute(two, "SET LOCAL lock_timeout = '50ms'", "SELECT pg_advisory_xact_lock(1)")


async def idle_in_transaction(engine: AsyncEngine, scenario: Scenario) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await execute(conn, "SET idle_in_transaction_session_timeout = '50ms'")
        await scenario.until(lambda: _is_gone(scenario, pid), within=10, what="the end of the session")
        await execute(conn, "SELECT 1")


async def _is_gone(scenario: Scenario, pid: int) -> bool:
    return await scenario.sql(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}") == "0"


async def ended_between_statements(engine: AsyncEngine, scenario: Scenario) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await scenario.sql(f"SELECT pg_terminate_backend({pid}, 10_000)")  # returns once it has ended
        await execute(conn, "SELECT 1")


async def ended_before_the_connection_is_seen_to_end(engine: AsyncEngine, scenario: Scenario) -> None:
    """A state that lasts microseconds: the driver has read the end of its session, not yet that of the connection."""
    async with engine.connect() as conn:
        driver = (await conn.get_raw_connection()).driver_connection
        assert driver is not None
        (line,) = scenario.database_proxy.connections
        line.hide_server_close = True
        await scenario.sql(f"SELECT pg_terminate_backend({driver.get_server_pid()}, 10_000)")
        await asyncio.wait_for(line.server_closed.wait(), 10)
        await asyncio.sleep(0.1)  # for the loop to hand it to the driver
        try:
            with pytest.raises(asyncpg.InternalClientError) as caught:
                await driver.fetch("SELECT 1", timeout=5)
        finally:
            line.cut()
        raise caught.value


async def ended_in_a_statement(engine: AsyncEngine, scenario: Scenario) -> None:
    await _during_a_statement(engine, scenario, "pg_terminate_backend")


async def cancelled_by_an_operator(engine: AsyncEngine, scenario: Scenario) -> None:
    await _during_a_statement(engine, scenario, "pg_cancel_backend")


async def _during_a_statement(engine: AsyncEngine, scenario: Scenario, function: str) -> None:
    """Call *function* of PostgreSQL with the process id of a session that executes a statement."""
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        statement = asyncio.create_task(execute(conn, "SELECT pg_sleep(60)"))
        await scenario.until(lambda: _sleeps(scenario, pid), what="the statement")
        await scenario.sql(f"SELECT {function}({pid})")
        await statement


async def _sleeps(scenario: Scenario, pid: int) -> bool:
    return await scenario.sql(f"SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}") == "PgSleep"


async def too_many_connections(engine: AsyncEngine, scenario: Scenario) -> None:
    await scenario.sql(f"ALTER ROLE {scenario.role} CONNECTION LIMIT 0")
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def read_only(engine: AsyncEngine, _: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "SET TRANSACTION READ ONLY", "DELETE FROM governance.incidents")


async def undefined_table(engine: AsyncEngine, _: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1 FROM governance.not_yet")


async def undefined_column(engine: AsyncEngine, _: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "SELECT not_yet FROM governance.incidents")


async def no_schema(engine: AsyncEngine, scenario: Scenario) -> None:
    await scenario.sql("ALTER SCHEMA governance RENAME TO elsewhere")
    try:
        async with engine.connect() as conn:
            await execute(conn, "SELECT 1 FROM governance.incidents")
    finally:
        await scenario.sql("ALTER SCHEMA elsewhere RENAME TO governance")


async def no_database(_: AsyncEngine, scenario: Scenario) -> None:
    engine = create_engine(scenario.postgres.url("not_there"))
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def no_role(_: AsyncEngine, scenario: Scenario) -> None:
    engine = create_engine(scenario.postgres.url(scenario.database, user="nobody_there"))
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def not_permitted(engine: AsyncEngine, _: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "TRUNCATE governance.incidents")


async def connection_cut_between_statements(engine: AsyncEngine, scenario: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")
        scenario.database_proxy.cut()
        await asyncio.sleep(0.05)
        await execute(conn, "SELECT 1")


async def connection_cut_in_a_statement(engine: AsyncEngine, scenario: Scenario) -> None:
    async with engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        statement = asyncio.create_task(execute(conn, "SELECT pg_sleep(5)"))
        await scenario.until(lambda: _sleeps(scenario, pid), what="the statement")
        scenario.database_proxy.cut()
        await statement


async def connection_cut_in_the_commit(engine: AsyncEngine, scenario: Scenario) -> None:
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")
        next(iter(scenario.database_proxy.connections)).drop_next_response = True
        await conn.commit()


async def refused(engine: AsyncEngine, scenario: Scenario) -> None:
    scenario.database_proxy.refuse()
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def accepted_and_closed(engine: AsyncEngine, scenario: Scenario) -> None:
    """A load balancer without a database behind it."""
    scenario.database_proxy.breaks = [(0, False)]
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def accepted_and_reset(engine: AsyncEngine, scenario: Scenario) -> None:
    scenario.database_proxy.breaks = [(0, True)]
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def silent(engine: AsyncEngine, scenario: Scenario) -> None:
    """The connection is accepted and nothing is ever sent: asyncpg's connect timeout applies."""
    scenario.database_proxy.stall()
    async with engine.connect() as conn:
        await execute(conn, "SELECT 1")


async def pool_exhausted(_: AsyncEngine, scenario: Scenario) -> None:
    engine = create_engine(scenario.environ["DATABASE_URL"], pool_size=1)
    engine.pool._timeout = 0.1  # type: ignore[attr-defined] # 10 s would be long
    try:
        async with engine.connect() as one, engine.connect():
            await execute(one, "SELECT 1")
    finally:  # otherwise garbage collection closes it with a warning, in another test
        await engine.dispose()


TRANSIENT: list[tuple[Errors, str | None]] = [
    (serialization_failure, "40001"),
    (deadlock, "40P01"),
    (statement_timeout, "57014"),
    (lock_timeout, "55P03"),
    (idle_in_transaction, None),
    (ended_between_statements, None),
    (ended_before_the_connection_is_seen_to_end, None),
    (ended_in_a_statement, "08003"),  # asyncpg's own; the server's 57P01 comes with the end of the connection
    (cancelled_by_an_operator, "57014"),
    (too_many_connections, "53300"),
    (read_only, "25006"),
    (undefined_table, "42P01"),
    (undefined_column, "42703"),
    (no_schema, "42P01"),
    (no_database, "3D000"),
    (no_role, "28000"),
    (not_permitted, "42501"),
    (connection_cut_between_statements, None),
    (connection_cut_in_a_statement, None),
    (connection_cut_in_the_commit, None),
    (refused, None),
    (accepted_and_closed, None),
    (accepted_and_reset, None),
    (silent, None),
    (pool_exhausted, None),
]
