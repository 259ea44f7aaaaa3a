"""``closeout reconcile``: every invariant broken once on a real database, and none reported next to live writers."""

import asyncio
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer import TransactionFailed, create_transaction_coordinator
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.maintenance import reconcile as module
from consumer.maintenance import slices
from consumer.maintenance.invariants import INVARIANTS, Statement
from consumer.maintenance.reconcile import Finding, reconcile
from consumer.maintenance.sources import SOURCES
from domains.policies.book import PolicyBook
from domains.run import CompletedRun
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, count, repair_writes
from tests.support.command_line import closeout
from tests.support.traffic import listen, received

OF_VICTIM = "WHERE (tenant_id, run_id) = (:tenant, :run)"
PUBLISH = (
    f"WITH gone AS (DELETE FROM governance.outbox_events {OF_VICTIM}) UPDATE governance.run_completions "
    f"SET phase = 'EVENTS_PUBLISHED', events_published_at = now() {OF_VICTIM}"
)
PREVENTION = (
    "INSERT INTO governance.prevention_records SELECT tenant_id, run_id, gen_random_uuid(), gen_random_uuid(), NULL, "
    f"now() FROM governance.run_completions {OF_VICTIM}"
)
UNFINISH = "UPDATE governance.run_completions SET mode = 'legacy', committed_at = NULL"
LATER = "created_at = created_at - interval '10 minutes'"
# A change to one healthy, committed run, the only invariant that may report it, and a part of the report.
PUBLISHED = f"UPDATE governance.run_completions SET phase = 'EVENTS_PUBLISHED', events_published_at = now() {OF_VICTIM}"
BREAKS: dict[str, tuple[str, str, list[str]]] = {
    "incident gone": ("one-finding", "neither", [f"DELETE FROM governance.incidents {OF_VICTIM}"]),
    "incident and prevention": ("one-finding", "both", [PREVENTION]),
    "evaluation gone": ("one-evaluation", "none", [f"DELETE FROM governance.policy_evaluations {OF_VICTIM}"]),
    "trace running": (
        "trace-completed",
        "running",
        [f"UPDATE governance.traces SET status = 'running', completed_at = NULL {OF_VICTIM}"],
    ),
    "trace gone, its event published": (
        "trace-written",
        "no trace",
        [
            f"DELETE FROM governance.traces {OF_VICTIM}",
            f"DELETE FROM governance.outbox_events {OF_VICTIM}",
            PUBLISHED,
        ],
    ),
    "steps gone": ("trace-written", "none of 2 steps", [f"UPDATE governance.traces SET steps = '[]' {OF_VICTIM}"]),
    "event names another run's trace": (
        "trace-of-run",
        "trace ",
        [f"UPDATE governance.traces SET trace_id = md5('other')::uuid {OF_VICTIM}"],
    ),
    "outbox emptied": (
        "phase-and-outbox",
        "COMMITTED with 0 events",
        [f"DELETE FROM governance.outbox_events {OF_VICTIM}"],
    ),
    "published too early": (
        "phase-and-outbox",
        "EVENTS_PUBLISHED with 3 events",
        [f"UPDATE governance.run_completions SET phase = 'EVENTS_PUBLISHED', events_published_at = now() {OF_VICTIM}"],
    ),
    "published without a time": (
        "phase-and-outbox",
        "not set",
        [PUBLISH, f"UPDATE governance.run_completions SET events_published_at = NULL {OF_VICTIM}"],
    ),
    "events before the end": (
        "phase-and-outbox",
        "TRACE_COMPLETED with 3 events",
        [
            f"{UNFINISH}, phase = 'TRACE_COMPLETED' {OF_VICTIM}",
        ],
    ),
    "event in the middle gone": (
        "outbox-suffix",
        "sequences 1, 3",
        [f"DELETE FROM governance.outbox_events {OF_VICTIM} AND sequence = 2"],
    ),
    "last event gone": (
        "outbox-suffix",
        "sequences 1, 2",
        [f"DELETE FROM governance.outbox_events {OF_VICTIM} AND sequence = 3"],
    ),
    "inbox row gone": (
        "no-orphans",
        "incidents, outbox_events, policy_evaluations, traces",
        [f"DELETE FROM governance.run_completions {OF_VICTIM}"],
    ),
    "atomic run unfinished": (
        "finished",
        "atomic",
        [f"UPDATE governance.run_completions SET committed_at = NULL {OF_VICTIM}"],
    ),
    "legacy phase without its time": (
        "finished",
        "legacy",
        [f"{UNFINISH} {OF_VICTIM}"],
    ),
    "events waiting for ten minutes": (
        "outbox-stale",
        "3 events since",
        [f"UPDATE governance.outbox_events SET {LATER} {OF_VICTIM}"],
    ),
    "legacy run unfinished for ten minutes": (
        "legacy-stale",
        "stopped at INCIDENT_CREATED",
        [
            f"DELETE FROM governance.outbox_events {OF_VICTIM}",
            f"{UNFINISH}, phase = 'INCIDENT_CREATED', received_at = received_at - interval '10 minutes' {OF_VICTIM}",
        ],
    ),
}


async def close_out(engine: AsyncEngine, number: int, **changes: Any) -> list[CompletedRun]:
    made = [runs.run(**changes) for _ in range(number)]
    await create_transaction_coordinator(engine=engine).execute_many(made)
    return made


async def apply(engine: AsyncEngine, victim: CompletedRun, *statements: str) -> None:
    async with engine.begin() as conn:
        for statement in statements:
            await conn.execute(text(statement), {"tenant": victim.tenant_id, "run": victim.run_id})


def broken(findings: Sequence[Finding]) -> dict[str, int]:
    return {finding.invariant.name: finding.count for finding in findings if finding.count}


async def checked(engine: AsyncEngine, **options: Any) -> list[Finding]:
    return await reconcile(engine, **{"older_than_seconds": 300, **options})


@pytest.mark.parametrize("what", BREAKS)
async def test_each_broken_invariant_is_reported_alone_with_its_run(engine, what):
    name, words, statements = BREAKS[what]
    healthy = await close_out(engine, 10)
    (victim,) = await close_out(engine, 1)
    await apply(engine, healthy[0], PUBLISH)
    assert broken(await checked(engine)) == {}

    await apply(engine, victim, *statements)

    ways: list[dict[str, Any]] = [
        {"runs_a_slice": 3},
        {"runs_a_slice": 3, "tenant": victim.tenant_id},
        {"runs_a_slice": 3, "since": datetime.now(UTC) - timedelta(hours=1)},
        {"since": datetime.now(UTC) - timedelta(hours=1), "tenant": victim.tenant_id},
    ]
    for way in ways:
        findings = await checked(engine, **way)
        if name == "no-orphans" and "since" in way:
            assert broken(findings) == {}
            assert "no-orphans" not in {finding.invariant.name for finding in findings}
            continue
        assert broken(findings) == {name: 1}, way
        (example,) = next(finding.examples for finding in findings if finding.count)
        assert (example.tenant_id, example.run_id) == (victim.tenant_id, victim.run_id)
        assert words in example.detail


async def test_every_page_of_a_table_is_read(engine, monkeypatch):
    """Each slice is one page; the runs fill several."""
    monkeypatch.setattr(slices, "PAGES_A_SLICE", 1)
    await close_out(engine, 100)
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE governance.run_completions SET committed_at = NULL"))
        await conn.execute(text("UPDATE governance.traces SET status = 'running', completed_at = NULL"))
        pages = await conn.execute(text("SELECT pg_relation_size('governance.run_completions') / 8192"))
        assert pages.scalar_one() > 3

    assert broken(await checked(engine)) == {"finished": 100}
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE governance.run_completions SET committed_at = now()"))
    assert broken(await checked(engine)) == {"trace-completed": 100}


@pytest.mark.parametrize("size", [1, 4, 1_000])
async def test_only_runs_received_since_a_time_are_checked(engine, size):
    await close_out(engine, 9)
    async with engine.begin() as conn:
        await conn.execute(text("DELETE FROM governance.policy_evaluations"))
        # Three runs of each of three hours.
        await conn.execute(
            text(
                "UPDATE governance.run_completions r SET received_at = now() - n.number / 3 * interval '1 hour' "
                "FROM (SELECT run_id, row_number() OVER () - 1 AS number FROM governance.run_completions) n "
                "WHERE n.run_id = r.run_id"
            )
        )
    for hours, found in ((0.5, 3), (1.5, 6), (2.5, 9)):
        since = datetime.now(UTC) - timedelta(hours=hours)
        assert broken(await checked(engine, since=since, runs_a_slice=size)) == {"one-evaluation": found}
    assert broken(await checked(engine, since=datetime.now(UTC) - timedelta(hours=3), tenant="unknown")) == {}


async def test_no_row_is_looked_up_without_need(engine):
    """A condition on another table's row is evaluated after the join, and only for rows that may violate a rule."""
    for run in await close_out(engine, 50):
        await apply(engine, run, PUBLISH)
    async with engine.connect() as conn:
        plans = [line for sql, part in _statements() for line in await _plan(conn, sql, part)]
    subplans = [line for before, line in pairwise(plans) if re.match(r" *SubPlan \d+$", before)]
    executed = [line for line in subplans if "never executed" not in line]
    assert len(subplans) > 10
    assert executed == []


def _statements() -> list[tuple[str, dict[str, Any]]]:
    everything = slices.Keys(None, None, None)
    checks = [check for invariant in INVARIANTS for check in invariant.checks]
    sources = [module._Checker([Finding(one) for one in INVARIANTS], 300, 20).statement(source) for source in SOURCES]
    statements = [check.sql for check in checks if isinstance(check, Statement)]
    return [(str(slices.bind(sql, everything)), {"older_than": 300} if ":older_than" in sql else {})
            for sql in (*sources, *statements)]  # fmt: skip


async def _plan(conn: AsyncConnection, sql: str, values: dict[str, Any]) -> list[str]:
    for name in slices.BY_RANGE:
        await conn.execute(text(f"SET LOCAL {name} = off"))
    return [row[0] for row in await conn.execute(text(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}"), values)]


def test_every_invariant_is_covered_by_a_test():
    assert {name for name, _, _ in BREAKS.values()} == {invariant.name for invariant in INVARIANTS}


@pytest.mark.parametrize("table", ["incidents", "policy_evaluations", "traces", "outbox_events"])
async def test_an_orphaned_row_is_found_in_any_table_and_the_table_named(engine, table):
    (victim,) = await close_out(engine, 1)
    others = {"incidents", "policy_evaluations", "traces", "outbox_events"} - {table} | {"run_completions"}

    await apply(engine, victim, *(f"DELETE FROM governance.{other} {OF_VICTIM}" for other in others))

    findings = await checked(engine)
    assert broken(findings)["no-orphans"] == 1
    assert next(f for f in findings if f.invariant.name == "no-orphans").examples[0].detail == table


async def test_an_empty_database_is_healthy(engine):
    assert broken(await checked(engine)) == {}


async def test_legitimate_states_are_not_reported(engine):
    """A run without a trace, two runs that name one trace, a runner's own trace, and a rolled-back run."""
    await close_out(engine, 1, trace_id=None)
    (first,) = await close_out(engine, 1)
    await close_out(engine, 1, trace_id=str(first.trace_id))
    await apply(
        engine,
        runs.run(),
        "INSERT INTO governance.traces (tenant_id, trace_id, run_id, status, started_at) "
        "VALUES (:tenant, gen_random_uuid(), :run, 'running', now() - interval '1 day')",
    )
    await break_writes_to(engine, "traces")
    with pytest.raises(TransactionFailed):
        await close_out(engine, 1)
    await repair_writes(engine)
    await break_writes_to(engine, "policy_evaluations")
    unfinished = runs.run()
    with pytest.raises(TransactionFailed):
        await LegacyCloseOut(engine=engine, policies=PolicyBook()).execute(Arrival.of(unfinished))
    assert broken(await checked(engine)) == {"legacy-stale": 1}  # at once, because a write failed
    await apply(engine, unfinished, f"DELETE FROM governance.rollbacks {OF_VICTIM}")  # in progress, as far as is known

    assert broken(await checked(engine)) == {}


async def test_broken_runs_are_counted_over_all_slices_and_named_up_to_the_limit(engine):
    await close_out(engine, 23)
    async with engine.begin() as conn:
        await conn.execute(text("DELETE FROM governance.policy_evaluations"))

    findings = await checked(engine, runs_a_slice=5, limit=7)

    assert broken(findings) == {"one-evaluation": 23}
    examples = next(finding.examples for finding in findings if finding.count)
    assert len({example.run_id for example in examples}) == 7


async def test_only_the_named_tenants_runs_are_checked(engine):
    (ours,) = await close_out(engine, 1, tenant_id="acme")
    (other,) = await close_out(engine, 1, tenant_id="globex")
    for victim in (ours, other):
        await apply(engine, victim, f"DELETE FROM governance.incidents {OF_VICTIM}")

    findings = await checked(engine, tenant="globex", runs_a_slice=1)

    assert broken(findings) == {"one-finding": 1}
    assert findings[0].examples[0].run_id == other.run_id


async def test_nothing_is_reported_while_both_kinds_of_writers_are_active(engine):
    coordinator = create_transaction_coordinator(engine=engine)
    legacy = LegacyCloseOut(engine=engine, policies=PolicyBook())
    stop = asyncio.Event()

    async def write_atomically() -> None:
        while not stop.is_set():
            made = [runs.run() for _ in range(5)]
            await coordinator.execute_many(made)
            for victim in made:
                await apply(engine, victim, PUBLISH)

    async def write_one_by_one() -> None:
        while not stop.is_set():
            await legacy.execute(Arrival.of(runs.run()))

    async with asyncio.TaskGroup() as group:
        for write in (write_atomically, write_atomically, write_one_by_one):
            group.create_task(write())
        while await count(engine, "run_completions") < 200:
            for size in (20, 1_000):
                assert broken(await checked(engine, runs_a_slice=size)) == {}
        stop.set()


async def test_the_command_prints_ok_for_each_invariant_and_exits_0(engine, database_url):
    await close_out(engine, 2)

    done = await closeout("reconcile", DATABASE_URL=database_url)

    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["ok", rule.name] for rule in INVARIANTS]


async def test_the_command_names_the_broken_run_with_its_remedy_and_exits_1(engine, database_url):
    (victim,) = await close_out(engine, 1)
    await apply(engine, victim, *BREAKS["legacy run unfinished for ten minutes"][2])

    done = await closeout("reconcile", DATABASE_URL=database_url)

    assert done.returncode == 1, done.stderr
    assert f"{victim.tenant_id}/{victim.run_id}  stopped at INCIDENT_CREATED" in done.stdout
    assert "meaning: a legacy close-out is unfinished" in done.stdout
    assert "the runner must publish it again, unchanged" in done.stdout


async def test_repair_publishes_stale_events_only(engine, database_url, broker, amqp_url):
    (stale, _young) = await close_out(engine, 2)
    await apply(engine, stale, f"UPDATE governance.outbox_events SET {LATER} {OF_VICTIM}")
    before = await closeout("reconcile", "--json", DATABASE_URL=database_url)
    events = await listen(broker)

    after = await closeout("reconcile", "--repair", "--json", AMQP_URL=amqp_url, DATABASE_URL=database_url)

    assert before.returncode == 1
    reported = {rule["name"]: rule for rule in json.loads(before.stdout)["invariants"] if rule["broken"]}
    assert [run["run_id"] for run in reported["outbox-stale"]["runs"]] == [str(stale.run_id)]
    assert after.returncode == 0, after.stdout + after.stderr
    assert json.loads(after.stdout)["repaired"] == {"runs": 1, "failure": None}
    assert {event.header.properties.correlation_id for event in await received(events, 3)} == {str(stale.run_id)}
    assert await count(engine, "outbox_events") == 3


async def test_repair_without_a_broker_still_reports_and_exits_1(engine, database_url):
    (stale,) = await close_out(engine, 1)
    await apply(engine, stale, f"UPDATE governance.outbox_events SET {LATER} {OF_VICTIM}")

    done = await closeout("reconcile", "--repair", AMQP_URL="amqp://u:p@127.0.0.1:1/", DATABASE_URL=database_url)

    assert done.returncode == 1
    assert "RabbitMQ is not available" in done.stdout
    assert f"{stale.tenant_id}/{stale.run_id}  3 events since" in done.stdout


@pytest.mark.parametrize("nonsense", ["5", "m", "-5m", "5 fortnights"])
async def test_an_invalid_threshold_is_a_usage_error(nonsense):
    done = await closeout("reconcile", f"--older-than={nonsense}", DATABASE_URL="postgresql://nowhere")

    assert done.returncode == 2
    assert "--older-than" in done.stderr
