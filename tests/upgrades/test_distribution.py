"""The tables can be distributed by tenant, and deploy/postgresql/citus.sql names each of them.

The tests have no Citus and use PostgreSQL: it requires of the keys of a partitioned table what Citus requires of those
of a distributed one, the column in each.
"""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

SCRIPT = Path(__file__).parents[2] / "deploy/postgresql/citus.sql"
FIRST = "governance.run_completions"
STAYS = "governance.schema_version"

# They take the arguments of Citus's functions of these names, and record them.
RECORDERS = """
CREATE TABLE public.noted (place serial, name text, by text, beside text);
CREATE FUNCTION create_distributed_table(table_name regclass, distribution_column text, colocate_with text) RETURNS void
    LANGUAGE sql AS 'INSERT INTO public.noted (name, by, beside) VALUES ($1, $2, $3)';
CREATE FUNCTION create_reference_table(table_name regclass) RETURNS void
    LANGUAGE sql AS 'INSERT INTO public.noted (name) VALUES ($1)';
"""
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


@pytest.fixture
async def noted(engine: AsyncEngine) -> list[Any]:
    """The calls of the script in order: name, column and neighbour; both are None for a reference table."""
    async with engine.begin() as conn:
        driver = (await conn.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute(RECORDERS)
        await driver.execute(SCRIPT.read_text())
        return list(await conn.execute(text("SELECT name, by, beside FROM public.noted ORDER BY place")))


def distributed(noted: list[Any]) -> set[str]:
    return {row.name for row in noted if row.by is not None}


async def test_every_table_is_distributed_by_tenant_or_a_reference_table(noted: list[Any], connection: AsyncConnection):
    names = [row.name for row in noted]
    assert sorted([*names, STAYS]) == sorted((await connection.execute(TABLES)).scalars())
    assert [tuple(row) for row in noted if row.name not in {FIRST, "governance.policies"}] == [
        (name, "tenant_id", FIRST) for name in names[1:-1]
    ]
    assert tuple(noted[0]) == (FIRST, "tenant_id", "none")
    assert tuple(noted[-1]) == ("governance.policies", None, None)


async def keys_without_the_tenant(conn: AsyncConnection, tables: set[str]) -> list[str]:
    keys = [row for row in await conn.execute(KEYS) if row.table in tables]
    assert {row.table for row in keys} == tables
    return [row.key for row in keys if "tenant_id" not in row.columns]


async def references_elsewhere(conn: AsyncConnection, noted: list[Any]) -> list[str]:
    """Return the foreign keys from a reference table to a distributed one, or to a local one."""
    everywhere = {row.name for row in noted} - distributed(noted)
    found = []
    for key in await conn.execute(REFERENCES):
        may = everywhere if key.of in everywhere else everywhere | distributed(noted)
        found += [key.name] if key.to not in may else []
    return found


async def test_every_key_of_a_distributed_table_contains_the_tenant(noted: list[Any], connection: AsyncConnection):
    assert await keys_without_the_tenant(connection, distributed(noted)) == []
    assert await references_elsewhere(connection, noted) == []


async def test_a_key_that_cannot_be_distributed_is_detected(noted: list[Any], connection: AsyncConnection):
    await connection.execute(text("CREATE UNIQUE INDEX by_id ON governance.incidents (incident_id)"))
    await connection.execute(
        text(
            "ALTER TABLE governance.policies ADD CONSTRAINT led_away FOREIGN KEY (policy_id) REFERENCES "
            "governance.incidents (incident_id)"
        )
    )
    assert await keys_without_the_tenant(connection, distributed(noted)) == ["governance.by_id"]
    assert await references_elsewhere(connection, noted) == ["led_away"]


@pytest.mark.parametrize(
    "name",
    [
        "run_completions",
        "incidents",
        "prevention_records",
        "policy_evaluations",
        "traces",
        "outbox_events",
        "rollbacks",
    ],
)
async def test_postgresql_can_partition_each_table_by_tenant_and_none_by_time(
    name: str, noted: list[Any], connection: AsyncConnection
):
    assert f"governance.{name}" in distributed(noted)
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
