"""Bringing the schema to this version, from an installed package, safe when several start it at once."""

from typing import NamedTuple

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from domains.schema import SCHEMA
from domains.tables import metadata

# Any number will do, as long as it is this project's own: "closeout" in ASCII.
_LOCK_KEY = 0x636C6F73656F7574
_VERSION_TABLE = "schema_version"


class Migrated(NamedTuple):
    """The schema's version before and after; equal when there was nothing to do."""

    before: str | None
    after: str


async def migrate(engine: AsyncEngine) -> Migrated:
    """Bring the schema to the newest version in one transaction, waiting while another process does so."""
    async with engine.connect() as conn:
        # Waiting for the other migrator may take longer than any statement of the worker may.
        await conn.execute(text("SET statement_timeout = 0"))
        await conn.execute(text("SET lock_timeout = 0"))
        await conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        # A table that the worker is using is waited for briefly, so that nobody queues behind this lock for long.
        await conn.execute(text("SET lock_timeout = '5s'"))
        await conn.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        before = await conn.run_sync(_current)
        await conn.run_sync(_upgrade)
        await conn.commit()
        await conn.invalidate()  # its settings must not reach the pool
    return Migrated(before, newest())


async def differences(engine: AsyncEngine) -> list[str]:
    """Return, in words, where the migrated schema and the tables disagree; empty when they agree."""
    async with engine.connect() as conn:
        return [str(found) for found in await conn.run_sync(_compare)]


def newest() -> str:
    """Return the version that this package brings the schema to."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    if head is None:
        raise RuntimeError("the package has no migrations")
    return head


def known() -> set[str]:
    """Return every version of the schema that this package can tell."""
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
        return (kind != "schema" or name == SCHEMA) and (kind != "table" or name != _VERSION_TABLE)

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


def _current(connection: Connection) -> str | None:
    return _context(connection).get_current_revision()


def _compare(connection: Connection) -> list[object]:
    return list(compare_metadata(_context(connection), metadata))
