"""Checks whether the schema is new enough for this version's workers. A newer schema always is."""

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.database.schema import SCHEMA
from domains.tables import metadata

# The oldest schema that this version's workers support; a migration that adds nothing they use does not raise it.
OLDEST_SCHEMA = "0009"

# Every role can read the catalog, but perhaps not the version table.
_COLUMNS = text(
    """
    SELECT c.relname, a.attname
      FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
     WHERE c.relnamespace = to_regnamespace(:schema) AND a.attnum > 0 AND NOT a.attisdropped
    """
)
_VERSION = text(f"SELECT version_num FROM {SCHEMA}.schema_version")  # noqa: S608 - a constant


async def unfit(conn: AsyncConnection) -> str | None:
    """Return why this version's workers do not support this schema; ``None`` if they do."""
    found = {tuple(row) for row in await conn.execute(_COLUMNS, {"schema": SCHEMA})}
    columns = [(table.name, column.name) for table in metadata.sorted_tables for column in table.columns]
    missing = next((f"{table}.{column}" for table, column in columns if (table, column) not in found), None)
    if missing is None:
        return None
    needs = f"this worker needs {OLDEST_SCHEMA}: run closeout migrate"
    try:
        version = (await conn.execute(_VERSION)).scalar_one_or_none()
    except DBAPIError:
        version = None  # this role may not read it
    if version is None:
        return f"PostgreSQL has no {SCHEMA}.{missing}; {needs}"
    return f"PostgreSQL's schema is at {version} and has no {missing}; {needs}"
