"""Holding a worker at one point of its way, from the database's side."""

import contextlib
from collections.abc import AsyncIterator

import asyncpg

from tests.support.fault_scenario import Scene

_KEY = 4711


@contextlib.asynccontextmanager
async def table_locked(scene: Scene, table: str) -> AsyncIterator[None]:
    """Let every statement on *table* wait; the worker's lock_timeout gives 5 s for what is to be done meanwhile."""
    conn = await asyncpg.connect(scene.postgres.url(scene.database))
    try:
        await conn.execute(f"BEGIN; LOCK TABLE governance.{table} IN ACCESS EXCLUSIVE MODE")
        yield
    finally:
        await conn.close()


@contextlib.asynccontextmanager
async def trigger_held(scene: Scene, when: str) -> AsyncIterator[None]:
    """Let a trigger wait: *when* is what stands between its name and EXECUTE."""
    conn = await asyncpg.connect(scene.postgres.url(scene.database))
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


async def waiting(scene: Scene) -> bool:
    return bool(await waiting_ports(scene))


async def waiting_ports(scene: Scene) -> list[int]:
    """Return the client ports of the worker's sessions that wait for a lock."""
    found = await scene.sql(
        f"SELECT client_port FROM pg_stat_activity WHERE usename = '{scene.role}' AND wait_event_type = 'Lock'"
    )
    return [int(port) for port in found.split()]
