"""Checks whether the database accepts close-outs now, and from this role."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.errors import UnavailableError, one_line, sqlstate_of
from consumer.postgres.engine import CONNECT_TIMEOUT_SECONDS, DATABASE_ERRORS
from consumer.postgres.privileges import REMEDY, format_privileges, missing_privileges
from domains.database.pooling import STATEMENT_PREFIX, mixes_statements
from domains.migrations.compatibility import unfit

_NO_SUCH_STATEMENT = "26000"  # invalid_sql_statement_name
_MIXED = (
    "a pooler in front of PostgreSQL mixes prepared statements: use PgBouncer 1.21 or newer with "
    "max_prepared_statements = 200, or no pooler"
)


def unavailable(error: BaseException) -> UnavailableError:
    """Return the error for a probe that failed with *error*, one of :data:`DATABASE_ERRORS`."""
    # Only a pooler that mixes sessions loses a prepared statement.
    if sqlstate_of(error) == _NO_SUCH_STATEMENT and STATEMENT_PREFIX in str(error):
        return UnavailableError(_MIXED)
    return UnavailableError(f"PostgreSQL is not available: {one_line(error)}")


async def probe(engine: AsyncEngine) -> None:
    """Return if the database accepts close-outs; raise :class:`UnavailableError` with the reason if not."""
    try:
        # A stalled connection times out, which removes it from the pool.
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            mixed = await mixes_statements(engine)
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS), engine.connect() as conn:
            read_only = (await conn.execute(text("SHOW transaction_read_only"))).scalar_one()
            table = (await conn.execute(text("SELECT to_regclass('governance.run_completions')"))).scalar_one()
            behind = None if table is None else await unfit(conn)
    except DATABASE_ERRORS as error:
        raise unavailable(error) from error
    if mixed:
        raise UnavailableError(_MIXED)
    if read_only == "on":
        raise UnavailableError("PostgreSQL is read-only: a standby, or a primary with default_transaction_read_only")
    if table is None:
        raise UnavailableError("PostgreSQL has no table governance.run_completions: run closeout migrate")
    if behind is not None:
        raise UnavailableError(behind)


async def ping(engine: AsyncEngine) -> None:
    """Return if the database responds; raise :class:`UnavailableError` if not. One statement, nothing is read."""
    for last in (False, True):
        try:
            async with engine.connect() as conn:
                await conn.execute(text("SELECT 1"))
        except DATABASE_ERRORS as error:
            if last:
                raise unavailable(error) from error
            continue  # one idle connection was closed: the next is new
        return


async def probe_privileges(engine: AsyncEngine) -> None:
    """Return if the database accepts close-outs from this role; raise :class:`UnavailableError` if not.

    Without this check a worker without a privilege would take deliveries and requeue them repeatedly while it is ready.
    """
    await probe(engine)
    try:
        async with engine.connect() as conn:
            missing = await missing_privileges(conn)
    except DATABASE_ERRORS as error:
        raise unavailable(error) from error
    if missing:
        raise UnavailableError(f"PostgreSQL: missing privileges: {format_privileges(missing)}: {REMEDY}")
