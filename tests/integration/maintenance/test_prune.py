"""``closeout prune``: old runs are deleted completely, others are kept, and nothing is blocked."""

import asyncio
import json
import re
from contextlib import asynccontextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import TransactionFailed, TransactionResult, create_transaction_coordinator
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.errors import UnavailableError
from consumer.maintenance.prune import Pruned, Scope, cutoff, prune
from consumer.maintenance.reconcile import reconcile
from consumer.postgres.engine import LOCK_TIMEOUT_SECONDS, create_engine
from domains.policies.book import PolicyBook
from domains.run import CompletedRun
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, count, repair_writes
from tests.support.command_line import closeout, on_a_terminal, plain

TABLES = ("run_completions", "incidents", "prevention_records", "policy_evaluations", "traces", "rollbacks")
OLD = timedelta(days=90)
DONE = {"status": "succeeded", "error_code": None}


async def close_out(
    engine: AsyncEngine, number: int, *, days: int = 100, published: bool = True, **changes: Any
) -> Any:
    """Close out runs as of *days* days ago; their events are published if *published*. Return them."""
    made = [runs.run(**{**DONE, **changes}) for _ in range(number)]
    await create_transaction_coordinator(engine=engine).execute_many(made)
    ids = {"ids": [str(run.run_id) for run in made], "days": days}
    of_these = "WHERE run_id = ANY(CAST(:ids AS uuid[]))"
    async with engine.begin() as conn:
        await conn.execute(
            text(
                f"UPDATE governance.run_completions SET received_at = now() - make_interval(days => :days) {of_these}"
            ),
            ids,
        )
        if published:
            await conn.execute(text(f"DELETE FROM governance.outbox_events {of_these}"), ids)
            await conn.execute(
                text(f"UPDATE governance.run_completions SET phase = 'EVENTS_PUBLISHED', events_published_at = now() "
                     f"{of_these}"), ids,
            )  # fmt: skip
    return made


@asynccontextmanager
async def pruning(database_url: str):
    engine = create_engine(database_url, pool_size=1, by_key=True)
    yield engine
    await engine.dispose()


async def pruned(database_url: str, *, batch: int = 500, progress: Any = None, **scope: Any) -> Pruned:
    report = Pruned()
    async with pruning(database_url) as engine:
        before = await cutoff(engine, scope.pop("age", OLD))
        await prune(engine, Scope(before, **scope), report, batch=batch, progress=progress)
    return report


async def stored(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as conn:
        return {str(i) for i in (await conn.execute(text("SELECT run_id FROM governance.run_completions"))).scalars()}


def ids_of(made: list[CompletedRun]) -> set[str]:
    return {str(run.run_id) for run in made}


async def suppress_timeouts(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.policies VALUES (gen_random_uuid(), NULL, 'quiet', 1, 'suppress_incident', "
                "'LOW', 'run.error_code == \"EXECUTION_TIMEOUT\"', true, now())"
            )
        )


async def test_an_old_run_is_deleted_with_all_its_rows_and_a_recent_one_is_kept(engine, database_url):
    await suppress_timeouts(engine)
    await close_out(engine, 3)
    await close_out(engine, 2, status="failed", error_code="EXECUTION_TIMEOUT")
    await break_writes_to(engine, "traces")
    twice_tried = runs.run(**DONE)
    with pytest.raises(TransactionFailed):
        await create_transaction_coordinator(engine=engine).execute(twice_tried)
    await repair_writes(engine)
    await close_out(engine, 1, run_id=str(twice_tried.run_id))
    young = await close_out(engine, 4, days=80)

    done = await closeout("prune", "--older-than", "90d", DATABASE_URL=database_url)

    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "6 runs removed: incidents 4, prevention_records 2, policy_evaluations 6, traces 6, rollbacks 1, "
        "run_completions 6\n"
    )
    assert await stored(engine) == ids_of(young)
    assert [await count(engine, table) for table in TABLES] == [4, 4, 0, 4, 4, 0]


async def test_runs_that_must_be_kept_are_counted_by_reason(engine, database_url):
    waiting = await close_out(engine, 2, published=False)
    is_open = await close_out(engine, 3, status="failed", error_code="AGENT_CRASH")
    await break_writes_to(engine, "traces")
    unfinished = runs.run()
    with pytest.raises(TransactionFailed):
        await LegacyCloseOut(engine=engine, policies=PolicyBook()).execute(Arrival.of(unfinished))
    await repair_writes(engine)
    async with engine.begin() as conn:
        await conn.execute(
            text("UPDATE governance.run_completions SET received_at = now() - interval '1 year' WHERE mode = 'legacy'")
        )
    await close_out(engine, 5)

    done = await closeout("prune", "--older-than", "90d", "--json", DATABASE_URL=database_url)

    document = json.loads(done.stdout)
    assert (document["runs"], document["complete"], document["failure"]) == (5, True, None)
    assert document["kept"] == {"open_incident": 3, "events_waiting": 2, "unfinished": 1, "in_use": 0}
    assert await stored(engine) == ids_of([*waiting, *is_open, unfinished])
    assert await count(engine, "outbox_events") == 6
    assert (await reconcile_counts(engine)).keys() <= {"outbox-stale", "legacy-stale"}


async def test_runs_with_open_incidents_are_deleted_only_when_requested(engine, database_url):
    await close_out(engine, 3, status="failed", error_code="AGENT_CRASH")

    kept = await closeout("prune", "--older-than", "90d", DATABASE_URL=database_url)
    gone = await closeout("prune", "--older-than", "90d", "--open-incidents", DATABASE_URL=database_url)

    assert "3 runs kept: incident OPEN (--open-incidents removes these)" in kept.stdout
    assert gone.stdout.startswith("3 runs removed")
    assert [await count(engine, table) for table in TABLES] == [0] * 6


async def test_a_run_with_unpublished_events_is_kept_whatever_its_phase(engine, database_url):
    await close_out(engine, 1, published=False)
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE governance.run_completions SET phase = 'EVENTS_PUBLISHED'"))

    report = await pruned(database_url)

    assert (report.runs, report.events_waiting) == (0, 1)
    assert await count(engine, "outbox_events") == 3


async def test_a_dry_run_counts_without_changes_or_locks(engine, database_url):
    await close_out(engine, 7)
    await close_out(engine, 2, status="failed", error_code="AGENT_CRASH")
    async with engine.begin() as conn:
        await conn.execute(text("SELECT FROM governance.run_completions FOR UPDATE"))
        done = await closeout("prune", "--older-than", "90d", "--dry-run", "--batch", "2", DATABASE_URL=database_url)

    assert done.stdout.splitlines()[0] == "7 runs would be removed: run_completions 7"
    assert "2 runs kept: incident OPEN" in done.stdout
    assert await count(engine, "run_completions") == 9


async def test_only_the_named_tenants_runs_are_deleted(engine, database_url):
    await close_out(engine, 2, tenant_id="acme")
    others = await close_out(engine, 3, tenant_id="globex")

    await closeout("prune", "--older-than", "90d", "--tenant", "acme", DATABASE_URL=database_url)

    assert await stored(engine) == ids_of(others)


async def test_an_age_below_the_redelivery_window_is_refused_unless_forced(engine, database_url):
    (again,) = await close_out(engine, 1, days=3)

    refused = await closeout("prune", "--older-than", "2d", DATABASE_URL=database_url)
    assert refused.returncode == 2
    assert "expected 7d or more, because a message that arrives again" in refused.stderr
    assert (await closeout("prune", "--older-than", "soon", DATABASE_URL=database_url)).returncode == 2
    assert (await closeout("prune", DATABASE_URL=database_url)).returncode == 2

    forced = await closeout("prune", "--older-than", "2d", "--force", DATABASE_URL=database_url)
    assert forced.stdout.startswith("1 run removed")
    assert (await create_transaction_coordinator(engine=engine).execute(again)).state == "committed"


async def test_rollbacks_of_uncommitted_runs_are_deleted_by_their_own_age(engine, database_url):
    await break_writes_to(engine, "traces")
    for _ in range(3):
        with pytest.raises(TransactionFailed):
            await create_transaction_coordinator(engine=engine).execute(runs.run())
    (young,) = await close_out(engine, 1, days=5, trace_id=None)
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "UPDATE governance.rollbacks SET occurred_at = now() - interval '91 days' "
                "WHERE rollback_id <> (SELECT rollback_id FROM governance.rollbacks LIMIT 1)"
            )
        )
        await conn.execute(
            text(
                "INSERT INTO governance.rollbacks SELECT tenant_id, gen_random_uuid(), run_id, 1, 'NOT_STARTED', '[]', "
                "'E', 'e', now() - interval '91 days' FROM governance.run_completions"
            )
        )

    counted = await pruned(database_url, dry_run=True, batch=1)
    report = await pruned(database_url, batch=1)

    assert counted.rows == report.rows == {"rollbacks": 2}
    async with engine.connect() as conn:
        left = (await conn.execute(text("SELECT run_id FROM governance.rollbacks"))).scalars().all()
    assert len(left) == 2
    assert young.run_id in left


async def test_no_partly_deleted_run_is_ever_visible_and_batches_add_up(engine, database_url):
    await close_out(engine, 300)
    await close_out(engine, 100, days=1)
    seen: list[tuple[int, int]] = []
    working = asyncio.create_task(pruned(database_url, batch=7, progress=lambda *at: seen.append(at)))
    looks = 0
    while not working.done():
        assert await reconcile_counts(engine) == {}
        looks += 1

    report = await working
    assert looks > 3
    assert (report.runs, report.rows["traces"], await count(engine, "run_completions")) == (300, 300, 100)
    assert len(seen) > 300 / 7
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


async def test_locked_rows_are_skipped_and_deleted_the_next_time(engine, database_url):
    await close_out(engine, 6)
    async with engine.connect() as one, engine.connect() as other:
        await one.execute(text("SELECT FROM governance.run_completions ORDER BY run_id LIMIT 1 FOR UPDATE"))
        await other.execute(text("SELECT FROM governance.incidents ORDER BY run_id DESC LIMIT 1 FOR UPDATE"))
        started = monotonic()
        first = await pruned(database_url)
        took = monotonic() - started

    assert (first.runs, first.in_use) == (4, 2)
    assert took < LOCK_TIMEOUT_SECONDS  # a wait for a lock takes that long
    assert await reconcile_counts(engine) == {}
    assert (await pruned(database_url)).runs == 2


async def test_a_concurrent_worker_is_not_blocked(engine, database_url):
    """New runs, and redeliveries of runs that are being deleted, which are new or duplicates."""
    old = await close_out(engine, 4_000)
    coordinator = create_transaction_coordinator(engine=engine)
    slowest = took = 0.0
    states: set[str] = set()

    async def prune_all() -> Pruned:
        nonlocal took
        started = monotonic()
        report = await pruned(database_url, batch=200)
        took = monotonic() - started
        return report

    async def executed(batch: list[CompletedRun]) -> list[TransactionResult]:
        """Close out *batch*; as a worker does, repeat what an outage or a run deleted during its claim ended."""
        while True:
            try:
                return await coordinator.execute_many(batch)
            except TransactionFailed as failed:
                if not isinstance(failed.__cause__, UnavailableError):
                    raise

    async def close_out_all_the_while() -> None:
        nonlocal slowest
        for at in range(0, 4_000, 20):
            started = monotonic()
            done = await executed([*(runs.run(**DONE) for _ in range(20)), *old[at : at + 3]])
            slowest = max(slowest, monotonic() - started)
            states.update(result.state for result in done[20:])
            if working.done():
                return

    working = asyncio.create_task(prune_all())
    await close_out_all_the_while()
    report = await working

    assert report.runs + report.in_use + len(states) > 3_900
    assert states <= {"duplicate", "committed"}
    assert "committed" in states
    # Twenty batches: waiting for one takes a twentieth of the time, on a slow machine too.
    assert slowest < max(1.0, took / 3)
    assert await reconcile_counts(engine) == {}


async def test_a_batch_uses_tid_range_and_key_lookups_only(engine, database_url):
    async with engine.begin() as conn:
        # Autovacuum summarizes new page ranges of a BRIN index at any time, and each counts as a scan of the table.
        for table, time in (("run_completions", "received_at"), ("rollbacks", "occurred_at")):
            await conn.execute(text(f"ALTER TABLE governance.{table} SET (autovacuum_enabled = off)"))
            await conn.execute(text(f"ALTER INDEX governance.{table}_{time} SET (autosummarize = off)"))
        await conn.execute(
            text(
                "INSERT INTO governance.run_completions (tenant_id, run_id, status, phase, mode, payload_digest, "
                "started_at, completed_at, is_synthetic, metadata, received_at, committed_at) "
                "SELECT 't', gen_random_uuid(), 'succeeded', 'EVENTS_PUBLISHED', 'atomic', '', now(), now(), false, "
                "'{}', now() - make_interval(days => n % 200), now() FROM generate_series(1, 40000) n"
            )
        )
    await close_out(engine, 50)
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.rollbacks SELECT 't', gen_random_uuid(), gen_random_uuid(), 1, 'x', '[]', 'E', "
                "'e', now() - make_interval(days => n % 200) FROM generate_series(1, 5000) n"
            )
        )
    async with engine.connect() as conn:
        analyze = await conn.execution_options(isolation_level="AUTOCOMMIT")
        await analyze.execute(text("ANALYZE"))
    before = await scans(engine)
    async with pruning(database_url) as pruner:
        statements: dict[str, Any] = {}
        event.listen(
            pruner.sync_engine, "before_cursor_execute", lambda c, cur, sql, args, *_: statements.setdefault(sql, args)
        )
        report = Pruned()
        await prune(pruner, Scope(await cutoff(pruner, OLD)), report, batch=1_000)
        kept = dict(statements)
        plans = []
        async with pruner.connect() as conn:
            await conn.execute(text(next(sql for sql in kept if "set_config" in sql)))
            for sql, args in kept.items():
                if "governance." in sql and "regclass" not in sql:
                    explained = await conn.exec_driver_sql(f"EXPLAIN {sql}", args)
                    plans.append("\n".join(explained.scalars()))
            await conn.execute(text("SELECT pg_stat_force_next_flush()"))

    assert report.runs > 20_000
    assert await scans(engine) == before
    looks = [plan for plan in plans if "Tid Range Scan" in plan]
    assert len(looks) == 2, plans
    assert len(plans) >= 11
    for plan in plans:
        assert "Seq Scan" not in plan
        assert "Bitmap" not in plan
    assert all("run_completions_received_at" not in plan for plan in plans)


async def test_progress_is_shown_on_a_terminal(engine, database_url):
    await close_out(engine, 30)

    status, written = await on_a_terminal("prune", "--older-than", "90d", "--batch", "1", DATABASE_URL=database_url)

    assert status == 0, written
    assert "pruning" in plain(written)
    assert re.search(r"\b(\d+)/\1\b", plain(written))
    assert "30 runs removed" in plain(written)


async def test_an_interruption_reports_what_was_deleted_and_leaves_no_partial_run(engine, database_url, postgres):
    await close_out(engine, 20)
    name = database_url.rsplit("/", 1)[1]
    role = f"pruner_{name}"
    async with engine.begin() as conn:
        await conn.execute(text(f"CREATE ROLE {role} LOGIN"))
        await conn.execute(text(f"GRANT USAGE ON SCHEMA governance TO {role}"))
        await conn.execute(text(f"GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA governance TO {role}"))
        await conn.execute(text(f"GRANT DELETE ON governance.incidents TO {role}"))

    done = await closeout("prune", "--older-than", "90d", DATABASE_URL=postgres.url(name, user=role))

    assert done.returncode == 1
    assert "0 runs removed" in done.stdout
    assert "stopped early: PostgreSQL: permission denied for table prevention_records" in done.stderr
    assert [await count(engine, table) for table in ("run_completions", "incidents")] == [20, 20]


async def test_a_database_without_the_schema_is_reported(empty_database_url):
    done = await closeout("prune", "--older-than", "90d", DATABASE_URL=empty_database_url)

    assert done.returncode == 1
    assert 'relation "governance.run_completions" does not exist' in done.stderr


async def reconcile_counts(engine: AsyncEngine) -> dict[str, int]:
    findings = await reconcile(engine, older_than_seconds=300)
    return {finding.invariant.name: finding.count for finding in findings if finding.count}


async def scans(engine: AsyncEngine) -> dict[str, int]:
    """Return how often each table was scanned. This session's own scans are flushed first: PostgreSQL may take 10 s."""
    async with engine.connect() as conn:
        await conn.execute(text("SELECT pg_stat_force_next_flush()"))
        await conn.commit()
        found = await conn.execute(
            text("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname = ANY(:tables) ORDER BY 1"),
            {"tables": [*TABLES, "outbox_events"]},
        )
        return {row.relname: row.seq_scan for row in found}
