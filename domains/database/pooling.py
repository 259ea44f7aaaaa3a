"""Detects a pooler in front of PostgreSQL, and whether it mixes prepared statements."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

# Prefix of prepared statements' names; a pooler that supports them renames them.
STATEMENT_PREFIX = "closeout_"
# Attempts to see one session given to two connections; another client may take it in between.
_LOOKS = 3

_PID = text("SELECT pg_backend_pid()")
_NAMES = text("SELECT pg_backend_pid() AS pid, bool_or(starts_with(name, :prefix)) AS ours FROM pg_prepared_statements")


async def is_pooled(conn: AsyncConnection) -> bool:
    """Return whether a pooler such as PgBouncer is in between: its cancel key is not the server's."""
    driver = (await conn.get_raw_connection()).driver_connection
    if driver is None:
        return False
    return bool(driver.get_server_pid() != (await conn.execute(_PID)).scalar_one())


async def mixes_statements(engine: AsyncEngine) -> bool:
    """Return whether a pooler gave one session to two connections without separating their prepared statements.

    A statement that one connection prepared is then missing in its next session. A pooler in session mode is safe.
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
