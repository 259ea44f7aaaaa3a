"""What must stand before a worker can work: the database's schema and the broker's topology."""

import asyncio

import pytest
from sqlalchemy import text

from consumer.broker import BrokerConnection
from consumer.database import create_engine
from consumer.topology import TOPOLOGY, TopologyMismatchError, declare
from domains.migrate import differences, migrate, newest
from domains.tables import metadata


async def test_several_migrators_at_once_leave_one_schema(empty_database_url):
    engines = [create_engine(empty_database_url, pool_size=1) for _ in range(4)]

    done = await asyncio.gather(*(migrate(engine) for engine in engines))

    assert sorted(d.before or "" for d in done) == ["", *[newest()] * 3]
    assert await differences(engines[0]) == []
    await asyncio.gather(*(engine.dispose() for engine in engines))


async def test_the_migrated_schema_and_the_tables_agree_and_a_difference_is_seen(engine):
    assert await differences(engine) == []
    async with engine.begin() as conn:
        await conn.execute(text("ALTER TABLE governance.incidents DROP COLUMN title"))
        await conn.execute(text("DROP INDEX governance.rollbacks_by_run"))
    found = " ".join(await differences(engine))
    assert "title" in found
    assert "rollbacks_by_run" in found


async def test_every_table_and_every_index_of_ours_says_its_purpose_in_the_database(connection):
    silent = (
        (
            await connection.execute(
                text(
                    "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                    "WHERE n.nspname = 'governance' AND c.relname NOT LIKE 'schema_version%' "
                    "AND c.relname NOT LIKE '%pkey' "
                    "AND c.relkind IN ('r', 'i') AND obj_description(c.oid, 'pg_class') IS NULL"
                )
            )
        )
        .scalars()
        .all()
    )
    assert silent == []


def test_the_tenant_is_in_every_key_of_every_table_that_holds_a_tenants_data():
    for table in metadata.tables.values():
        if table.name == "policies":
            continue
        assert "tenant_id" in table.primary_key.columns, table.name
        for constraint in table.constraints:
            names = {column.name for column in getattr(constraint, "columns", ())}
            if type(constraint).__name__ in {"UniqueConstraint", "ForeignKeyConstraint"}:
                assert "tenant_id" in names, constraint.name


async def test_the_topology_is_declared_and_declaring_it_again_changes_nothing(bare_amqp_url, rabbit):
    connection = BrokerConnection(bare_amqp_url, name="test")
    first = await declare(connection)
    assert await declare(connection) == first
    await connection.close()
    vhost = bare_amqp_url.rsplit("/", 1)[1]
    queues = rabbit.ctl("-q", "list_queues", "-p", vhost, "name", "type", "durable")
    rows = {tuple(line.split()) for line in queues.splitlines()}
    assert rows >= {(queue.name, "quorum", "true") for queue in TOPOLOGY.queues}


async def test_what_exists_with_other_properties_is_named_in_words_and_all_of_it(bare_amqp_url):
    connection = BrokerConnection(bare_amqp_url, name="test")
    channel = await connection.channel(confirms=False)
    await channel.exchange_declare("runs", exchange_type="direct", durable=True)
    await channel.queue_declare("closeout.parked", durable=True)

    with pytest.raises(TopologyMismatchError) as mismatch:
        await declare(connection)

    lines = str(mismatch.value).splitlines()
    assert lines[0].startswith("exchange runs exists with other properties")
    assert "'direct'" in lines[0]
    assert lines[1].startswith("queue closeout.parked exists with other properties")
    assert "x-queue-type" in lines[1] or "durable" in lines[1]
    assert all("closeout topology" in line for line in lines)
    await connection.close()
