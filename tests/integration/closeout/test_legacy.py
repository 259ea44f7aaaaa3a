"""The non-atomic path, the setting that chooses it, and the interaction of both paths."""

import asyncio
from collections.abc import Callable
from time import monotonic

import msgspec
import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import TransactionFailed, create_transaction_coordinator
from consumer.closeout.dispatcher import Dispatcher, Rollout
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.outcome import Failed, TransactionResult
from consumer.closeout.retries import GIVE_UP_AFTER_SECONDS, retry_transient
from consumer.delivery.settlement import Park, settle
from consumer.maintenance.reconcile import reconcile
from consumer.metrics import Metrics
from consumer.phases import TransactionPhase
from consumer.postgres.engine import create_engine
from domains import tables
from domains.policies.book import PolicyBook
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, count, only_row, repair_writes

STEPS = {
    "incidents": TransactionPhase.NOT_STARTED,
    "policy_evaluations": TransactionPhase.INCIDENT_CREATED,
    "traces": TransactionPhase.POLICY_EVALUATED,
    "outbox_events": TransactionPhase.TRACE_COMPLETED,
}


@pytest.fixture
def legacy(engine: AsyncEngine) -> LegacyCloseOut:
    return LegacyCloseOut(engine=engine, policies=PolicyBook())


async def violated(engine: AsyncEngine) -> dict[str, int]:
    found = await reconcile(engine, older_than_seconds=300)
    return {finding.invariant.name: finding.count for finding in found if finding.count}


def dispatcher(engine: AsyncEngine, rollout: Rollout, **more: Callable[[], bool]) -> Dispatcher:
    metrics = Metrics()
    return Dispatcher(
        coordinator=create_transaction_coordinator(engine=engine, metrics=metrics),
        legacy=LegacyCloseOut(engine=engine, policies=PolicyBook(), metrics=metrics),
        rollout=rollout,
        metrics=metrics,
        **more,
    )


async def test_the_legacy_path_writes_the_same_rows_and_marks_its_mode(legacy, engine):
    result = await legacy.execute(Arrival.of(runs.run()))

    assert result.state == "committed"
    assert [r.domain for r in result.results] == ["incidents", "policies", "traces"]
    stored = await only_row(engine, "run_completions")
    assert (stored["mode"], stored["phase"]) == ("legacy", "COMMITTED")
    assert stored["committed_at"] is not None
    assert await count(engine, "outbox_events") == 3


@pytest.mark.parametrize("table", STEPS)
async def test_a_legacy_failure_keeps_the_rows_written_and_a_redelivery_completes_them(legacy, engine, table):
    arrival = Arrival.of(runs.run())
    await break_writes_to(engine, table)

    with pytest.raises(TransactionFailed) as failure:
        await legacy.execute(arrival)

    assert failure.value.phase is STEPS[table]
    assert (await only_row(engine, "run_completions"))["phase"] == STEPS[table].value
    assert await count(engine, "outbox_events") == 0
    await repair_writes(engine)
    assert (await legacy.execute(arrival)).state == "committed"
    for name in ("run_completions", "incidents", "policy_evaluations", "traces"):
        assert await count(engine, name) == 1, name
    assert await count(engine, "outbox_events") == 3


async def test_an_unfinished_legacy_run_is_completed_by_the_coordinator(legacy, engine):
    arrival = Arrival.of(runs.run())
    await break_writes_to(engine, "traces")
    with pytest.raises(TransactionFailed):
        await legacy.execute(arrival)
    await repair_writes(engine)
    before = await only_row(engine, "incidents")

    (outcome,) = await dispatcher(engine, Rollout(enabled=True)).close_out([arrival])

    assert isinstance(outcome, TransactionResult)
    assert outcome.state == "committed"
    assert await only_row(engine, "incidents") == before
    assert (await only_row(engine, "run_completions"))["mode"] == "legacy"


async def test_two_legacy_workers_write_every_row_once(engine):
    arrival = Arrival.of(runs.run())
    first, second = (LegacyCloseOut(engine=engine, policies=PolicyBook()) for _ in range(2))

    await asyncio.gather(first.execute(arrival), second.execute(arrival))

    assert [await count(engine, t) for t in ("incidents", "policy_evaluations", "traces", "outbox_events")] == [
        1,
        1,
        1,
        3,
    ]


async def test_a_run_closed_out_on_one_path_is_a_duplicate_on_the_other(legacy, engine):
    coordinator = create_transaction_coordinator(engine=engine)
    one, other = Arrival.of(runs.run()), Arrival.of(runs.run())
    await coordinator.execute(one)
    await legacy.execute(other)

    assert (await legacy.execute(one)).state == "duplicate"
    assert (await coordinator.execute(other)).state == "duplicate"
    assert await count(engine, "incidents") == 2


async def test_the_legacy_path_detects_a_conflicting_duplicate(legacy, engine):
    arrival = Arrival.of(runs.run())
    await legacy.execute(arrival)

    changed = Arrival.of(msgspec.structs.replace(arrival.run, model="another"))
    result = await legacy.execute(changed)
    assert (result.state, result.difference) == ("conflict", 'model: stored "gpt-4o", found "another"')
    assert (await legacy.execute(arrival._replace(digest=b"other"))).state == "duplicate"


@pytest.mark.parametrize(
    ("rollout", "modes"),
    [
        (Rollout(enabled=False), {"a": "legacy", "b": "legacy"}),
        (Rollout(enabled=True), {"a": "atomic", "b": "atomic"}),
        (Rollout(enabled=True, tenants=frozenset({"a"})), {"a": "atomic", "b": "legacy"}),
        (Rollout(enabled=False, tenants=frozenset({"a"})), {"a": "legacy", "b": "legacy"}),
    ],
)
async def test_the_coordinator_settings_choose_the_path_of_each_tenant(engine, rollout, modes):
    arrivals = [Arrival.of(runs.run(tenant_id=tenant)) for tenant in ("a", "b")]

    outcomes = await dispatcher(engine, rollout).close_out(arrivals)

    assert [o.state for o in outcomes if isinstance(o, TransactionResult)] == ["committed", "committed"]
    async with engine.connect() as conn:
        rows = await conn.execute(select(tables.run_completions.c.tenant_id, tables.run_completions.c.mode))
        assert dict([tuple(row) for row in rows]) == modes


async def test_a_failed_transaction_falls_back_to_the_legacy_path_only_when_enabled(engine):
    # Fails in the atomic path only: there the inbox row is COMMITTED before the incident is written.
    async with engine.begin() as conn:
        await conn.execute(
            text("ALTER TABLE governance.run_completions ADD CONSTRAINT no_atomic CHECK (mode <> 'atomic')")
        )
    arrival = Arrival.of(runs.run())

    (refused,) = await dispatcher(engine, Rollout(enabled=True)).close_out([arrival])
    (fallen_back,) = await dispatcher(engine, Rollout(enabled=True, fallback=True)).close_out([arrival])

    assert isinstance(refused, Failed)
    assert isinstance(fallen_back, TransactionResult)
    assert (await only_row(engine, "run_completions"))["mode"] == "legacy"


@pytest.mark.parametrize("rollout", [Rollout(enabled=True, fallback=True), Rollout(enabled=False)], ids=str)
async def test_a_partly_stored_run_is_reported_at_once_and_completed_by_its_message(engine, rollout):
    arrival = Arrival.of(runs.run())
    await break_writes_to(engine, "traces")

    (outcome,) = await dispatcher(engine, rollout).close_out([arrival])

    settlement = settle(outcome, attempts=4, max_attempts=5)
    assert isinstance(settlement, Park)
    assert "partly stored, up to POLICY_EVALUATED: a replay of the message completes the run" in settlement.error
    assert "injected" in settlement.error
    assert await violated(engine) == {"legacy-stale": 1}

    await repair_writes(engine)
    (completed,) = await dispatcher(engine, rollout).close_out([arrival])

    assert isinstance(completed, TransactionResult)
    assert completed.state == "committed"
    assert await violated(engine) == {}


@pytest.mark.parametrize("enabled", [False, True])
async def test_many_runs_wait_no_longer_than_one_during_an_outage(enabled, monkeypatch):
    monkeypatch.setitem(retry_transient.__kwdefaults__, "give_up_after", 1.0)
    engine = create_engine("postgresql://nobody@127.0.0.1:1/nothing")
    arrivals = [Arrival.of(runs.run()) for _ in range(30)]
    started = monotonic()

    outcomes = await dispatcher(engine, Rollout(enabled=enabled)).close_out(arrivals)

    assert 1.0 <= monotonic() - started < 15.0  # one after another, they would wait for 30 s
    assert [type(outcome) for outcome in outcomes] == [Failed] * 30


async def test_a_stopping_worker_does_not_retry():
    engine = create_engine("postgresql://nobody@127.0.0.1:1/nothing")
    started = monotonic()

    (outcome,) = await dispatcher(engine, Rollout(enabled=True), give_up=lambda: True).close_out(
        [Arrival.of(runs.run())]
    )

    assert monotonic() - started < GIVE_UP_AFTER_SECONDS  # retries take longer than that
    assert isinstance(outcome, Failed)


async def test_a_suppressing_policy_takes_effect_on_both_paths(legacy, engine):
    async with engine.begin() as conn:
        await conn.execute(
            tables.policies.insert().values(
                policy_id=runs.run().run_id,
                tenant_id=None,
                name="quiet",
                version=1,
                effect="suppress_incident",
                severity="LOW",
                condition="run.error_code == 'EXECUTION_TIMEOUT'",
                enabled=True,
            )
        )
    await legacy.execute(Arrival.of(runs.run()))
    await create_transaction_coordinator(engine=engine).execute(runs.run())

    assert [await count(engine, t) for t in ("incidents", "prevention_records")] == [0, 2]
    async with engine.connect() as conn:
        keys = (
            (await conn.execute(select(tables.outbox_events.c.routing_key).where(tables.outbox_events.c.sequence == 1)))
            .scalars()
            .all()
        )
    assert keys == ["incident.suppressed.high"] * 2


async def test_a_crash_between_legacy_writes_is_reported_as_unfinished(legacy, engine):
    arrival = Arrival.of(runs.run())
    await legacy.execute(arrival)
    async with engine.begin() as conn:
        await conn.execute(update(tables.run_completions).values(phase="INCIDENT_CREATED", committed_at=None))
        unfinished = select(func.count()).where(tables.run_completions.c.committed_at.is_(None))
        assert (await conn.execute(unfinished)).scalar_one() == 1
    assert (await create_transaction_coordinator(engine=engine).execute(arrival)).state == "unfinished"
