"""Whether a connection is a session of the server's own, or a pooler stands between."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_PID = text("SELECT pg_backend_pid()")


async def is_pooled(conn: AsyncConnection) -> bool:
    """Say whether a pooler such as PgBouncer is in the way: it gave a key for cancelling that is not the server's."""
    driver = (await conn.get_raw_connection()).driver_connection
    if driver is None:
        return False
    return bool(driver.get_server_pid() != (await conn.execute(_PID)).scalar_one())
