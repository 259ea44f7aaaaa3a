"""Alembic's environment: runs on the connection that ``upgrade.py`` passes, and opens none."""

from alembic import context
from sqlalchemy import Connection

from domains.database.schema import SCHEMA
from domains.tables import metadata


def _ours_only(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "schema" or name == SCHEMA


def run(connection: Connection) -> None:
    """Run Alembic's command on *connection*: in its open transaction, or in one transaction per migration."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_schemas=True,
        include_name=_ours_only,
        version_table="schema_version",
        version_table_schema=SCHEMA,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
