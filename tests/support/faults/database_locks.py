"""Locks that stop a worker at one point of its transaction."""

import contextlib
from collections.abc import AsyncIterator

import asyncpg

from tests.support.faults.scenario import Scenario

_KEY = 4711


@contextlib.asynccontextmanager
async def lock_table(scenario: Scenario, table: str) -> AsyncIterator[None]:
    """Block every statement on *table*; the worker's lock_timeout ends the wait after 5 s."""
    conn = await asyncpg.connect(scenario.postgres.url(scenario.database))
    try:
        await conn.execute(f"BEGIN; LOCK TABLE governance.{table} IN ACCESS EXCLUSIVE MODE")
        yield
    finally:
        await conn.close()


@contextlib.asynccontextmanager
async def hold_in_trigger(scenario: Scenario, when: str) -> AsyncIterator[None]:
    """Block in a trigger; *when* is the part of CREATE TRIGGER between its name and EXECUTE."""
    conn = await asyncpg.connect(scenario.postgres.url(scenario.database))
    try:
        await conn.execute(
            "CREATE FUNCTION governance.hold() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_advisory_xact_lock_shared({_KEY}); RETURN COALESCE(NEW, OLD); END $$"
        )
        kind = "CONSTRAINT TRIGGER" if "DEFERR" in when else "TRIGGER"
        await conn.execute(f"CREATE {kind} hold {when} EXECUTE FUNCTION governance.hold()")
        await conn.execute(f"SELECT pg_advisory_lock({_KEY})")
        yield
    finally:
        await conn.close()


async def waits_for_lock(scenario: Scenario) -> bool:
    return bool(await ports_waiting_for_locks(scenario))


async def ports_waiting_for_locks(scenario: Scenario) -> list[int]:
    """Return the client ports of the worker's sessions that wait for a lock."""
    found = await scenario.sql(
        f"SELECT client_port FROM pg_stat_activity WHERE usename = '{scenario.role}' AND wait_event_type = 'Lock'"
    )
    return [int(port) for port in found.split()]
