"""The tables can be distributed by tenant, as closeout distribute does on Citus.

These tests have no Citus and use PostgreSQL: it requires of the keys of a partitioned table what Citus requires of
those of a distributed one, the column in each. tests/citus uses a real one.
"""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.migrations.distribution import EVERYWHERE, FIRST, distributed_tables

DISTRIBUTED = {str(table) for table in distributed_tables()}
ON_EVERY_NODE = {str(table) for table in EVERYWHERE}
STAYS = "governance.schema_version"

TABLES = text(
    "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'governance'::regnamespace AND relkind IN ('r', 'p')"
)
# One row per column of each unique index, constraints included; an expression has no name.
KEYS = text(
    """
    SELECT i.indrelid::regclass::text AS table, i.indexrelid::regclass::text AS key,
           array_agg(a.attname::text) AS columns
      FROM pg_index i
      JOIN pg_class c ON c.oid = i.indrelid AND c.relnamespace = 'governance'::regnamespace
      LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
     WHERE i.indisunique
     GROUP BY 1, 2
    UNION ALL
    SELECT k.conrelid::regclass::text, k.conname, array_agg(a.attname::text)
      FROM pg_constraint k
      JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)
     WHERE k.connamespace = 'governance'::regnamespace AND k.contype IN ('f', 'x')
     GROUP BY 1, 2
    """
)
REFERENCES = text(
    """
    SELECT conname AS name, conrelid::regclass::text AS of, confrelid::regclass::text AS to FROM pg_constraint
     WHERE connamespace = 'governance'::regnamespace AND contype = 'f'
    """
)


async def test_every_table_is_distributed_by_tenant_or_on_every_node(connection: AsyncConnection):
    names = [*DISTRIBUTED, *ON_EVERY_NODE, STAYS]
    assert sorted(names) == sorted((await connection.execute(TABLES)).scalars())
    assert next(distributed_tables()) is FIRST


async def keys_without_the_tenant(conn: AsyncConnection, tables: set[str]) -> list[str]:
    keys = [row for row in await conn.execute(KEYS) if row.table in tables]
    assert {row.table for row in keys} == tables
    return [row.key for row in keys if "tenant_id" not in row.columns]


async def references_elsewhere(conn: AsyncConnection) -> list[str]:
    """Return the foreign keys from a table on every node to a distributed one, or to a local one."""
    found = []
    for key in await conn.execute(REFERENCES):
        may = ON_EVERY_NODE if key.of in ON_EVERY_NODE else ON_EVERY_NODE | DISTRIBUTED
        found += [key.name] if key.to not in may else []
    return found


async def test_every_key_of_a_distributed_table_contains_the_tenant(connection: AsyncConnection):
    assert await keys_without_the_tenant(connection, DISTRIBUTED) == []
    assert await references_elsewhere(connection) == []


async def test_a_key_that_cannot_be_distributed_is_detected(connection: AsyncConnection):
    await connection.execute(text("CREATE UNIQUE INDEX by_id ON governance.incidents (incident_id)"))
    await connection.execute(
        text(
            "ALTER TABLE governance.policies ADD CONSTRAINT led_away FOREIGN KEY (policy_id) REFERENCES "
            "governance.incidents (incident_id)"
        )
    )
    assert await keys_without_the_tenant(connection, DISTRIBUTED) == ["governance.by_id"]
    assert await references_elsewhere(connection) == ["led_away"]


@pytest.mark.parametrize("name", sorted(table.name for table in distributed_tables()))
async def test_postgresql_can_partition_each_table_by_tenant_and_none_by_time(name: str, connection: AsyncConnection):
    alike = f"CREATE TABLE parted (LIKE governance.{name} INCLUDING ALL) PARTITION BY "
    await connection.execute(text(f"{alike} HASH (tenant_id)"))
    await connection.rollback()
    times = await connection.execute(
        text(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:name) AND atttypid = 'timestamptz'::regtype"
        ),
        {"name": f"governance.{name}"},
    )
    columns = times.scalars().all()
    assert columns
    for column in columns:
        with pytest.raises(DBAPIError, match="must include all partitioning columns"):
            await connection.execute(text(f"{alike} RANGE ({column})"))
        await connection.rollback()
