"""Checks whether the schema is new enough for this version's workers. A newer schema always is."""

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, TEXT
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.database.schema import SCHEMA
from domains.tables import metadata

# The oldest schema that this version's workers support; a migration that adds nothing they use does not raise it.
OLDEST_SCHEMA = "0007"

# Every role can read the catalog, but perhaps not the version table.
_MISSING = text(
    """
    SELECT w.tab || '.' || w.col
      FROM unnest(:tables, :columns) WITH ORDINALITY AS w (tab, col, place)
     WHERE NOT EXISTS (
           SELECT FROM pg_attribute a
            WHERE a.attrelid = to_regclass(:schema || '.' || w.tab) AND a.attname = w.col
              AND a.attnum > 0 AND NOT a.attisdropped)
     ORDER BY w.place
     LIMIT 1
    """
).bindparams(bindparam("tables", type_=ARRAY(TEXT)), bindparam("columns", type_=ARRAY(TEXT)))
_VERSION = text(f"SELECT version_num FROM {SCHEMA}.schema_version")  # noqa: S608 - a constant


async def unfit(conn: AsyncConnection) -> str | None:
    """Return why this version's workers do not support this schema; ``None`` if they do."""
    columns = [(table.name, column.name) for table in metadata.sorted_tables for column in table.columns]
    names = {"tables": [table for table, _ in columns], "columns": [column for _, column in columns]}
    missing = (await conn.execute(_MISSING, {"schema": SCHEMA, **names})).scalar_one_or_none()
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
