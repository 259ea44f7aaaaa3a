"""Migrations of a database with data, next to a worker of the older version."""

import asyncio
import re
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from urllib.parse import urlsplit

import pytest
from alembic import command
from sqlalchemy import Index, Table, text
from sqlalchemy.exc import OperationalError

from consumer import create_transaction_coordinator
from consumer.postgres.engine import create_engine
from domains.database.schema import SCHEMA
from domains.migrations.upgrade import (
    GIVE_UP_AFTER_SECONDS,
    MigrationBlockedError,
    config,
    differences,
    migrate,
    newest,
)
from domains.tables import metadata
from tests.support import roles
from tests.support import run_messages as runs

# Statements of a worker of 0001.
OLD_EVALUATION = text(
    "INSERT INTO governance.policy_evaluations (tenant_id, run_id, policy_evaluation_id, outcome, policies_checked, "
    "violations, errors, evaluated_at) VALUES ('acme', gen_random_uuid(), gen_random_uuid(), 'no_violation', 1, "
    "'[]', '[]', now())"
)
OLD_POLICY = text(
    "INSERT INTO governance.policies (policy_id, tenant_id, name, version, effect, severity, condition, enabled) "
    "VALUES (gen_random_uuid(), 'acme', :name, 1, 'flag', 'LOW', 'true', :enabled)"
)
OLD_IN_FORCE = text("SELECT name FROM governance.policies WHERE enabled ORDER BY name")
FILES = text(
    "SELECT relname, pg_relation_filenode(oid) FROM pg_class "
    "WHERE relnamespace = 'governance'::regnamespace AND relkind IN ('r', 'i') ORDER BY 1"
)
STORED = text(
    "SELECT relname, reloptions FROM pg_class "
    "WHERE relnamespace = 'governance'::regnamespace AND reloptions IS NOT NULL"
)


@pytest.fixture
async def old(empty_database_url):
    """An engine for a database of version 0001, with data in it."""
    async with AsyncExitStack() as closing:
        made = create_engine(empty_database_url, pool_size=8)
        closing.push_async_callback(made.dispose)
        async with made.begin() as conn:
            await conn.execute(text(f"CREATE SCHEMA {SCHEMA}"))
            await conn.run_sync(lambda opened: command.upgrade(config(opened), "0001"))
            await conn.execute(OLD_POLICY, {"name": "in force", "enabled": True})
            await conn.execute(OLD_POLICY, {"name": "off", "enabled": False})
            for _ in range(50):
                await conn.execute(OLD_EVALUATION)
        yield made


@asynccontextmanager
async def held(engine, *statements):
    """A transaction that has executed *statements* and stays open."""
    async with engine.connect() as conn:
        for statement in statements:
            await conn.execute(statement)
        yield conn
        await conn.rollback()


async def test_migrating_from_the_first_version_keeps_data_and_rewrites_no_table(old):
    async with old.connect() as conn:
        before = (await conn.execute(FILES)).all()

    assert await migrate(old) == ("0001", newest())

    assert await differences(old) == []
    async with old.connect() as conn:
        after = (await conn.execute(FILES)).all()
        assert {file for file in before if file.relname in {table.name for table in metadata.sorted_tables}} <= set(
            after
        )
        states = (await conn.execute(text("SELECT name, enabled, shadow FROM governance.policies ORDER BY name"))).all()
        counts = (await conn.execute(text("SELECT count(*), count(shadow) FROM governance.policy_evaluations"))).one()
    assert [tuple(row) for row in states] == [("in force", True, None), ("off", False, None)]
    assert tuple(counts) == (50, 0)


async def test_an_older_worker_continues_and_ignores_shadow_policies(old):
    await migrate(old)
    async with old.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.policies (policy_id, name, version, effect, severity, condition, enabled, "
                "shadow) VALUES (gen_random_uuid(), 'shadow', 1, 'flag', 'LOW', 'true', false, 'running')"
            )
        )
        await conn.execute(OLD_EVALUATION)
        assert (await conn.execute(OLD_IN_FORCE)).scalars().all() == ["in force"]
    result = await create_transaction_coordinator(engine=old).execute(runs.run())
    assert result.state == "committed"


async def test_a_migration_waiting_for_a_long_transaction_does_not_block_others(old):
    async with held(old, OLD_IN_FORCE, OLD_EVALUATION):
        migrating = asyncio.create_task(migrate(old))
        started = monotonic()
        while monotonic() < started + 4:
            async with old.begin() as conn:  # if blocked, it fails after lock_timeout, as in workers
                await conn.execute(OLD_IN_FORCE)
                await conn.execute(OLD_EVALUATION)
        assert not migrating.done()
    assert await asyncio.wait_for(migrating, 60) == ("0001", newest())
    assert await differences(old) == []


async def test_a_migration_blocked_by_a_transaction_names_it_and_changes_nothing(old):
    async with held(old, OLD_EVALUATION) as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        with pytest.raises(MigrationBlockedError) as blocked:
            await migrate(old, give_up_after=1)
    assert f"pid {pid} (" in str(blocked.value)
    assert re.search(
        r"The longest current transactions: pid \d+ \(postgres, closeout\), started 0:00:\d\d ago, "
        r"holds governance.policy_evaluations$",
        str(blocked.value),
    )
    async with old.connect() as conn:
        assert (await conn.execute(text("SELECT version_num FROM governance.schema_version"))).scalar_one() == "0001"


async def test_a_blocked_migration_names_the_role_where_the_age_is_hidden(old, postgres, empty_database_url):
    """As on a managed server, where roles.sql cannot give the owner pg_read_all_stats."""
    roles.make_roles(postgres, urlsplit(empty_database_url).path[1:])
    postgres.psql(f"REVOKE pg_read_all_stats FROM {roles.OWNER}")
    owner = create_engine(roles.as_role(empty_database_url, roles.OWNER), pool_size=2)
    try:
        async with held(owner, OLD_IN_FORCE), held(old, OLD_EVALUATION) as conn:
            pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            with pytest.raises(MigrationBlockedError) as blocked:
                await migrate(owner, give_up_after=1)
    finally:
        postgres.psql(f"GRANT pg_read_all_stats TO {roles.OWNER}")
        await owner.dispose()
    assert re.search(
        r"Current transactions, those of unknown age first: "
        rf"pid {pid} \(postgres, closeout\) holds governance.policy_evaluations; "
        rf"pid \d+ \({roles.OWNER}, closeout\), started 0:00:\d\d ago, holds governance.policies. "
        rf"Grant pg_read_all_stats to {roles.OWNER} to see the age of other roles' transactions$",
        str(blocked.value),
    )


async def test_a_migration_error_other_than_a_lock_timeout_is_not_retried(old):
    async with old.begin() as conn:
        await conn.execute(text("ALTER TABLE governance.policies ADD COLUMN shadow text"))
    started = monotonic()
    with pytest.raises(Exception, match="already exists") as failure:
        await migrate(old)
    assert not isinstance(failure.value, OperationalError)
    assert monotonic() - started < GIVE_UP_AFTER_SECONDS / 2


async def test_the_expansion_can_be_undone(old):
    await migrate(old)
    async with old.connect() as conn:
        await conn.run_sync(lambda opened: command.downgrade(config(opened), "0001"))
        await conn.commit()
    async with old.begin() as conn:
        await conn.execute(OLD_EVALUATION)
        columns = await conn.execute(
            text("SELECT 1 FROM information_schema.columns WHERE table_schema = :schema AND column_name = 'shadow'"),
            {"schema": SCHEMA},
        )
        assert columns.all() == []


async def test_storage_parameters_match_the_table_definitions(engine):
    """Alembic does not compare these; 0003 consists of them."""
    parameters: dict[str, list[str]] = {}
    for table in metadata.tables.values():
        stored: list[Table | Index] = [table, *table.indexes]
        for each in stored:
            if settings := each.dialect_options["postgresql"]["with"]:
                parameters[str(each.name)] = sorted(f"{name}={value}" for name, value in settings.items())
    async with engine.connect() as conn:
        found = await conn.execute(STORED)
    assert {row.relname: sorted(row.reloptions) for row in found} == parameters
    assert {"run_completions", "run_completions_received_at", "rollbacks_occurred_at"} == set(parameters)
