"""Databases at any version of the schema."""

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from domains.database.schema import SCHEMA
from domains.migrations.upgrade import config


def revisions() -> list[str]:
    """Return every version of the schema, the oldest first."""
    return [script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


async def bring_to(engine: AsyncEngine, revision: str) -> None:
    """Bring an empty database, or one of an older version, to *revision*, each migration in a transaction."""
    async with engine.connect() as conn:
        await conn.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        await conn.commit()
        await conn.run_sync(lambda opened: command.upgrade(config(opened), revision))
        await conn.commit()
