"""The schema and the topology that a worker needs."""

import asyncio
import re

import pytest
from sqlalchemy import text

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import TOPOLOGY, TopologyMismatchError, declare, without_overflow
from consumer.postgres.engine import create_engine
from domains.migrations.upgrade import differences, migrate, newest
from domains.tables import metadata

TO_DO = "; (?:to fix it|unless it is intended): "


async def test_concurrent_migrations_leave_one_schema(empty_database_url):
    engines = [create_engine(empty_database_url, pool_size=1) for _ in range(4)]

    done = await asyncio.gather(*(migrate(engine) for engine in engines))

    assert sorted(d.before or "" for d in done) == ["", *[newest()] * 3]
    assert await differences(engines[0]) == []
    await asyncio.gather(*(engine.dispose() for engine in engines))


async def test_each_difference_between_schema_and_tables_is_described_with_its_fix(engine):
    assert await differences(engine) == []
    changes = (
        "DROP TABLE governance.traces",
        "CREATE TABLE governance.ours (a int)",
        "ALTER TABLE governance.incidents DROP COLUMN title",
        "ALTER TABLE governance.incidents ADD COLUMN note text",
        "ALTER TABLE governance.incidents ADD CONSTRAINT loose UNIQUE (tenant_id, agent_id)",
        "ALTER TABLE governance.policies DROP CONSTRAINT policies_tenant_id_name_version_key",
        "ALTER TABLE governance.run_completions ALTER COLUMN cost_usd TYPE float, ALTER COLUMN model SET NOT NULL",
        "ALTER TABLE governance.outbox_events ALTER COLUMN created_at DROP DEFAULT",
        "DROP INDEX governance.rollbacks_by_run",
        "DROP INDEX governance.outbox_events_last_of_run",
        "CREATE INDEX outbox_events_last_of_run ON governance.outbox_events (created_at, sequence)",
        "CREATE INDEX our_index ON governance.incidents (agent_id)",
        "COMMENT ON TABLE governance.rollbacks IS NULL",
    )
    async with engine.begin() as conn:
        for change in changes:
            await conn.execute(text(change))

    found = await differences(engine)

    assert [re.split(TO_DO, line)[0] for line in found] == [
        "table ours is unexpected",
        "table traces is missing, with its data",
        "column incidents.note is unexpected",
        "column incidents.title is missing, with its data",
        "column outbox_events.created_at is different: its default differs",
        "column run_completions.cost_usd is different: its type is DOUBLE PRECISION, not NUMERIC",
        "column run_completions.model is different: it is NOT NULL",
        "constraint loose of incidents is unexpected",
        "constraint policies_tenant_id_name_version_key of policies is missing",
        "index our_index on incidents is unexpected",
        "index outbox_events_last_of_run on outbox_events is different",
        "index rollbacks_by_run on rollbacks is missing",
        "index traces_by_trace_id on traces is missing",
        "the comment on table rollbacks is different",
    ]
    async with engine.connect() as conn:
        each = await conn.execution_options(isolation_level="AUTOCOMMIT")
        for line in found:
            for statement in filter(None, re.split(r"; ?(?=[A-Z]|$)", re.split(TO_DO, line)[1])):
                await each.execute(text(statement))
    assert await differences(engine) == []


async def test_a_schema_of_another_version_is_reported_with_the_upgrade_command(engine):
    messages = {}
    async with engine.begin() as conn:
        await conn.execute(text("ALTER TABLE governance.incidents ADD COLUMN note text"))
    for version in ("0001", "9999"):
        async with engine.begin() as conn:
            await conn.execute(text("UPDATE governance.schema_version SET version_num = :v"), {"v": version})
        (messages[version],) = await differences(engine)
    assert messages["0001"] == f"it is at 0001; this version needs {newest()}: run closeout migrate"
    assert messages["9999"].startswith(f"it is at 9999, which this version ({newest()}) does not know: ")


async def test_every_table_and_index_has_a_comment_with_its_purpose(connection):
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


async def test_declaring_the_topology_is_idempotent(bare_amqp_url, rabbit):
    connection = BrokerConnection(bare_amqp_url, name="test")
    first = await declare(connection)
    assert await declare(connection) == first
    await connection.close()
    vhost = bare_amqp_url.rsplit("/", 1)[1]
    queues = rabbit.ctl("-q", "list_queues", "-p", vhost, "name", "type", "durable")
    rows = {tuple(line.split()) for line in queues.splitlines()}
    assert rows >= {(queue.name, "quorum", "true") for queue in TOPOLOGY.queues}


async def test_a_parked_queue_of_an_earlier_version_is_kept_and_named(bare_amqp_url):
    connection = BrokerConnection(bare_amqp_url, name="test")
    channel = await connection.channel(confirms=False)
    arguments = dict(without_overflow(TOPOLOGY.queues[0].arguments))
    await channel.queue_declare("closeout.parked", durable=True, arguments=arguments)

    lines = await declare(connection)

    assert "queue closeout.parked (without x-overflow: a max-length policy could drop messages" in "\n".join(lines)
    assert "binding closeout.internal --closeout.parked--> closeout.parked" in lines
    await connection.close()


async def test_every_queue_or_exchange_with_other_properties_is_described(bare_amqp_url):
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
