"""Migrations on tables of a million rows under the concurrent statements of workers."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

import domains.migrations.upgrade
from consumer.postgres.engine import create_engine
from domains.migrations.upgrade import config, migrate, newest
from tests.support.schemas import bring_to
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(180)

ROWS = 1_000_000
# lock_timeout of a writer: a COMMIT on a busy disk holds a lock for half a second, rewriting one of these tables for
# four seconds. A worker's is 5 s.
LOCK_TIMEOUT = "2s"
# Seconds that no transaction of a writer may take; lock_timeout detects a lock. A busy machine must not exceed it.
LONGEST = 30.0
WRITERS = 2

# Unlogged is twice as fast to fill; locks are the same.
UNLOGGED = "ALTER TABLE governance.{0} SET UNLOGGED"
FILL = {
    "policy_evaluations": (
        "INSERT INTO governance.policy_evaluations (tenant_id, run_id, policy_evaluation_id, outcome, "
        "policies_checked, violations, errors, evaluated_at) "
        "SELECT 'acme', id, id, 'no_violation', 1, '[]', '[]', now() FROM ids"
    ),
    "run_completions": (
        "INSERT INTO governance.run_completions (tenant_id, run_id, status, phase, mode, payload_digest, started_at, "
        "completed_at, is_synthetic, metadata, received_at, committed_at) SELECT 'acme', id, 'succeeded', "
        "'EVENTS_PUBLISHED', 'atomic', 'x', now(), now(), false, '{}', now(), now() FROM ids"
    ),
}
IDS = "WITH ids AS MATERIALIZED (SELECT {0} AS id FROM generate_series(1, {1}) AS number) "
ORDERED = "CAST(lpad(to_hex(number), 32, '0') AS uuid)"
WRITES = [text(IDS.format("gen_random_uuid()", 5) + statement) for statement in FILL.values()]
READ = text("SELECT phase FROM governance.run_completions WHERE tenant_id = 'acme' AND run_id = :id")
KNOWN = {"id": UUID(int=ROWS // 2)}

INDEX_OF_TOMORROW = """
from alembic import op

revision, down_revision = "9999", "{0}"


def upgrade():
    with op.get_context().autocommit_block():
        # It waits for older transactions and blocks none; an interrupted one leaves an invalid index.
        op.execute("SET lock_timeout = 0")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS governance.of_tomorrow")
        op.execute("CREATE INDEX CONCURRENTLY of_tomorrow ON governance.run_completions (model, received_at)")
"""


@pytest.fixture
async def large(empty_database_url: str) -> AsyncIterator[AsyncEngine]:
    """A database of the first version whose tables hold a million rows each."""
    engine = create_engine(empty_database_url, pool_size=WRITERS + 3, command_timeout=60)
    try:
        await bring_to(engine, "0001")
        await asyncio.gather(*(_filled(engine, table, fill) for table, fill in FILL.items()))
        await asyncio.to_thread(os.sync)  # writing the filled tables must not delay commits
        yield engine
    finally:
        await engine.dispose()


async def _filled(engine: AsyncEngine, table: str, fill: str) -> None:
    async with engine.begin() as conn:
        await conn.execute(text("SET LOCAL statement_timeout = 0"))
        await conn.execute(text(UNLOGGED.format(table)))
        await conn.execute(text(IDS.format(ORDERED, ROWS) + fill))


@asynccontextmanager
async def writers(engine: AsyncEngine) -> AsyncIterator[list[float]]:
    """Write and read as workers do until the block ends; yield the seconds that each transaction took."""
    took: list[float] = []
    enough = asyncio.Event()

    async def write() -> None:
        while not enough.is_set():
            started = monotonic()
            async with engine.begin() as conn:
                await conn.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                assert (await conn.execute(READ, KNOWN)).scalar_one() == "EVENTS_PUBLISHED"
                for statement in WRITES:
                    await conn.execute(statement)
            took.append(monotonic() - started)

    async with asyncio.TaskGroup() as group:
        for _ in range(WRITERS):
            group.create_task(write())
        await until(lambda: len(took) >= 5 * WRITERS)
        took.clear()
        try:
            yield took
            # Transactions that started meanwhile count, too.
            seen = len(took)
            await until(lambda: len(took) >= seen + 2 * WRITERS)
        finally:
            enough.set()


async def test_a_migration_of_a_million_rows_does_not_block_writers(
    large: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    latest = newest()
    async with writers(large) as took:
        assert await migrate(large) == ("0001", latest)
    assert max(took) < LONGEST

    (tmp_path / "9999_an_index.py").write_text(INDEX_OF_TOMORROW.format(latest))

    def with_tomorrow(connection=None):
        made = config(connection)
        ours = Path(domains.migrations.upgrade.__file__).parent / "versions"
        made.set_main_option("version_locations", f"{ours}{os.pathsep}{tmp_path}")
        return made

    monkeypatch.setattr(domains.migrations.upgrade, "config", with_tomorrow)
    async with writers(large) as took:
        # The second one waits, and the index must not wait for it.
        done = await asyncio.gather(migrate(large), migrate(large))
    assert max(took) < LONGEST
    assert sorted(done) == [(latest, "9999"), ("9999", "9999")]
    async with large.connect() as conn:
        valid = await conn.execute(
            text("SELECT indisvalid FROM pg_index WHERE indexrelid = 'governance.of_tomorrow'::regclass")
        )
        assert valid.scalar_one()
        assert await conn.scalar(text("SELECT count(*) > 1000000 FROM governance.run_completions"))
