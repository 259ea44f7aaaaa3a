"""Whether a connection is a session of the server's own, or a pooler stands between, and what it does to statements."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

# Before the names of prepared statements; a pooler that keeps them apart gives them names of its own.
STATEMENT_PREFIX = "closeout_"
# Looks for a session that two connections are given; somebody else may take it in between.
_LOOKS = 3

_PID = text("SELECT pg_backend_pid()")
_NAMES = text("SELECT pg_backend_pid() AS pid, bool_or(starts_with(name, :prefix)) AS ours FROM pg_prepared_statements")


async def is_pooled(conn: AsyncConnection) -> bool:
    """Say whether a pooler such as PgBouncer is in the way: it gave a key for cancelling that is not the server's."""
    driver = (await conn.get_raw_connection()).driver_connection
    if driver is None:
        return False
    return bool(driver.get_server_pid() != (await conn.execute(_PID)).scalar_one())


async def mixes_statements(engine: AsyncEngine) -> bool:
    """Say whether a pooler was seen to give one session to two connections without keeping their statements apart.

    A statement that one of them has prepared is then missing in the session that it is given next. A pooler in session
    mode does neither.
    """
    async with engine.connect() as conn:
        if not await is_pooled(conn):
            return False
        for _ in range(_LOOKS):
            row = (await conn.execute(_NAMES, {"prefix": STATEMENT_PREFIX})).one()
            if not row.ours:
                return False
            await conn.commit()
            async with engine.connect() as other:
                if (await other.execute(_PID)).scalar_one() == row.pid:
                    return True
    return False
