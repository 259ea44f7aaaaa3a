"""Migrates the schema to this version, from an installed package; concurrent migrators wait for each other.

Each migration is a separate transaction, so that its locks are released before the next one waits. A migration that
must not run in a transaction (``CREATE INDEX CONCURRENTLY``) uses ``op.get_context().autocommit_block()``.
"""

import asyncio
import re
from datetime import timedelta
from typing import NamedTuple

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random

from domains.database.pooling import is_pooled
from domains.database.schema import SCHEMA
from domains.migrations.drift import differences_in
from domains.tables import metadata

# The advisory lock's key: "closeout" in ASCII.
_LOCK_KEY = 0x636C6F73656F7574
_VERSION_TABLE = "schema_version"
# Seconds between two polls whether another migrator has finished. Waiting for the lock would hold a snapshot, which the
# other migrator's CREATE INDEX CONCURRENTLY would wait for.
_POLL_SECONDS = 0.2
# Sessions queue behind a waiting lock. One second is harmless, because workers wait 5.
_LOCK_WAIT = "1s"
# Seconds between two attempts, in which queued sessions proceed.
_PAUSE_SECONDS = (1.0, 3.0)
# Seconds after which a long transaction is reported instead of waited for.
GIVE_UP_AFTER_SECONDS = 120.0
# A part of a table that Citus moves, on the coordinator until Citus removes it.
_SHARD = re.compile(rf"({'|'.join(table.name for table in metadata.sorted_tables)})_\d{{6,}}")
# lock_not_available, deadlock_detected
_BLOCKED_STATES = frozenset({"55P03", "40P01"})
_TRY_LOCK = text("SELECT pg_try_advisory_lock(:key)")


class MigrationBlockedError(Exception):
    """Another transaction held a lock on a table; the text names it and the schema's version."""


class PooledConnectionError(Exception):
    """A migration needs a dedicated session, but a pooler changes it with each transaction."""


class Migrated(NamedTuple):
    """The schema's version before and after; equal if there was nothing to do."""

    before: str | None
    after: str


async def migrate(engine: AsyncEngine, *, give_up_after: float = GIVE_UP_AFTER_SECONDS) -> Migrated:
    """Migrate the schema to the newest version, one transaction per migration; wait while another process does so.

    Never waits long for a table in use, because other sessions would queue behind it: it gives up the lock and retries.
    Raises :class:`MigrationBlockedError` if that fails for *give_up_after* seconds; completed migrations remain. Raises
    :class:`PooledConnectionError` behind a pooler.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception(_is_blocked),
        wait=wait_random(*_PAUSE_SECONDS),
        stop=stop_after_delay(give_up_after),
        reraise=True,
    )
    started_at: list[str | None] = []
    try:
        await retrying(_migrate_once, engine, started_at)
    except DBAPIError as error:
        if not _is_blocked(error):
            raise
        raise MigrationBlockedError(await _blockers(engine, give_up_after)) from error
    return Migrated(started_at[0], newest())


async def _migrate_once(engine: AsyncEngine, started_at: list[str | None]) -> None:
    async with engine.connect() as conn:
        if await is_pooled(conn):
            raise PooledConnectionError(
                "closeout migrate needs a dedicated session, but a pooler is in front of PostgreSQL: "
                "set DATABASE_URL to the server itself"
            )
        await conn.execute(text("SET statement_timeout = 0"))
        await conn.execute(text(f"SET lock_timeout = '{_LOCK_WAIT}'"))
        await conn.commit()
        try:
            while not (await conn.execute(_TRY_LOCK, {"key": _LOCK_KEY})).scalar_one():
                await conn.commit()
                await asyncio.sleep(_POLL_SECONDS)
            # With separate roles the schema exists, and its owner may not create one, not even with IF NOT EXISTS.
            if (await conn.execute(text("SELECT to_regnamespace(:schema)"), {"schema": SCHEMA})).scalar_one() is None:
                await conn.execute(text(f"CREATE SCHEMA {SCHEMA}"))
            started_at.append(await conn.run_sync(current))
            await conn.commit()
            await conn.run_sync(_upgrade)
            await conn.commit()
        finally:
            await conn.invalidate()  # its settings must not reach the pool


def _is_blocked(error: BaseException) -> bool:
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _BLOCKED_STATES


_HOLDERS = """
    SELECT a.pid, a.usename, a.application_name, date_trunc('second', now() - a.xact_start) AS age,
           string_agg(DISTINCT l.relation::regclass::text, ', ') AS tables
      FROM pg_locks l
      JOIN pg_class c ON c.oid = l.relation AND c.relnamespace = to_regnamespace(:schema)
      JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.granted AND c.relkind = 'r' AND a.datname = current_database() AND a.pid <> pg_backend_pid()
     GROUP BY a.pid, a.usename, a.application_name, a.xact_start
     ORDER BY a.xact_start NULLS FIRST
     LIMIT 3
"""
# Without pg_read_all_stats the age of another role's transaction is hidden, and it may be the blocking one.
_AGES_HIDDEN = "Grant pg_read_all_stats to {} to see the age of other roles' transactions"


async def _blockers(engine: AsyncEngine, seconds: float) -> str:
    async with engine.connect() as conn:
        found = (await conn.execute(text(_HOLDERS), {"schema": SCHEMA})).all()
        role = (await conn.execute(text("SELECT current_user"))).scalar_one()
        at = await conn.run_sync(current)
    state = f"the schema is still {f'at {at}' if at else 'empty'}: its tables were in use for {seconds:g} s."
    holders = "; ".join(_holder(*row) for row in found)
    if any(row.age is None for row in found):
        return f"{state} Current transactions, those of unknown age first: {holders}. {_AGES_HIDDEN.format(role)}"
    return f"{state} The longest current transactions: {holders or 'none; try again'}"


def _holder(pid: int, role: str | None, program: str | None, age: timedelta | None, tables: str) -> str:
    # Autovacuum has no role.
    who = f"pid {pid} ({role or 'PostgreSQL itself'}, {program or 'no name'})"
    return f"{who} holds {tables}" if age is None else f"{who}, started {age} ago, holds {tables}"


async def differences(engine: AsyncEngine) -> list[str]:
    """Return where the schema and the tables differ, and what to do; empty if they agree.

    For a schema of another version, it returns only whether to migrate or to upgrade closeout.
    """
    async with engine.connect() as conn:
        at = await conn.run_sync(current)
        if at is None:
            return ["the schema does not exist: run closeout migrate"]
        if at != newest() and at in known():
            return [f"it is at {at}; this version needs {newest()}: run closeout migrate"]
        found = await conn.run_sync(lambda opened: differences_in(_context(opened), metadata))
        if found and at != newest():
            newer = "a newer version migrated it; upgrade closeout"
            return [f"it is at {at}, which this version ({newest()}) does not know: {newer}"]
        return found


def newest() -> str:
    """Return the newest version of the schema in this package."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    if head is None:
        raise RuntimeError("the package has no migrations")
    return head


def known() -> set[str]:
    """Return every version of the schema in this package."""
    return {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}


def config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration: the scripts of this package, run on *connection*."""
    made = Config()
    made.set_main_option("script_location", "domains:migrations")
    made.set_main_option("path_separator", "os")
    made.attributes["connection"] = connection
    return made


def _upgrade(connection: Connection) -> None:
    command.upgrade(config(connection), "head")


def _context(connection: Connection) -> MigrationContext:
    def ours_only(name: str | None, kind: str, _parents: object) -> bool:
        if kind == "table":
            return name != _VERSION_TABLE and not _SHARD.fullmatch(name or "")
        return kind != "schema" or name == SCHEMA

    return MigrationContext.configure(
        connection,
        opts={
            "version_table": _VERSION_TABLE,
            "version_table_schema": SCHEMA,
            "include_schemas": True,
            "include_name": ours_only,
            "compare_server_default": True,
        },
    )


def current(connection: Connection) -> str | None:
    """Return the schema's version, ``None`` before the first migration."""
    return _context(connection).get_current_revision()
