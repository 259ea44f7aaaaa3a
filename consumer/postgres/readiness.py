"""Whether the database can take a close-out now, and from this role."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.errors import UnavailableError, one_line, sqlstate_of
from consumer.postgres.engine import CONNECT_TIMEOUT_SECONDS, DATABASE_ERRORS
from consumer.postgres.rights import REMEDY, missing_rights, spelled_out
from domains.database.pooling import STATEMENT_PREFIX, mixes_statements
from domains.migrations.compatibility import unfit

_NO_SUCH_STATEMENT = "26000"  # invalid_sql_statement_name
_MIXED = (
    "PostgreSQL is behind a pooler that mixes up prepared statements: use PgBouncer 1.21 or newer with "
    "max_prepared_statements = 200, or no pooler"
)


def unavailable(error: BaseException) -> UnavailableError:
    """Say in words why a look at the database failed with *error*, one of :data:`DATABASE_ERRORS`."""
    # Nobody but us takes our statements away: this one was prepared in a session that is another connection's now.
    if sqlstate_of(error) == _NO_SUCH_STATEMENT and STATEMENT_PREFIX in str(error):
        return UnavailableError(_MIXED)
    return UnavailableError(f"PostgreSQL is not available: {one_line(error)}")


async def probe(engine: AsyncEngine) -> None:
    """Return if the database can take a close-out; raise :class:`UnavailableError` saying why it cannot."""
    try:
        # A connection whose line has stalled is given up, which takes it out of the pool.
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
        raise UnavailableError("PostgreSQL is read-only: a standby, or a primary that was told to be")
    if table is None:
        raise UnavailableError("PostgreSQL has no table governance.run_completions: run closeout migrate")
    if behind is not None:
        raise UnavailableError(behind)


async def probe_rights(engine: AsyncEngine) -> None:
    """Return if the database can take a close-out, and takes it from this role; raise :class:`UnavailableError` if not.

    A worker that found out by trying would take deliveries and give them back, again and again, and be ready meanwhile.
    """
    await probe(engine)
    try:
        async with engine.connect() as conn:
            missing = await missing_rights(conn)
    except DATABASE_ERRORS as error:
        raise unavailable(error) from error
    if missing:
        raise UnavailableError(f"PostgreSQL: this role lacks {spelled_out(missing)}: {REMEDY}")
