"""The atomic close-out on a real PostgreSQL."""

import asyncio
import json
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer import TransactionFailed, TransactionPhase, create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.closeout.inbox import Arrival
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.errors import Fault, fault_of
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.postgres.engine import create_engine
from domains import tables
from domains.policies.book import PolicyBook
from domains.policies.rules import PolicySet
from domains.run import CompletedRun
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, count, only_row, repair_writes
from tests.support.faults.proxy import Proxy
from tests.support.traffic import eventually
from tests.support.waiting import PATIENCE

DOMAIN_TABLES = ("run_completions", "incidents", "prevention_records", "policy_evaluations", "traces", "outbox_events")


@pytest.fixture
def coordinator(engine: AsyncEngine) -> RunCompletionTransaction:
    return create_transaction_coordinator(engine=engine)


async def test_a_run_is_closed_out_in_all_three_domains_with_its_events_staged(coordinator, engine):
    run = runs.run()

    result = await coordinator.execute(run)

    assert result.state == "committed"
    assert result.phase is TransactionPhase.COMMITTED
    assert [(r.domain, r.action) for r in result.results] == [
        ("incidents", "created"),
        ("policies", "created"),
        ("traces", "created"),
    ]
    incident = await only_row(engine, "incidents")
    assert (incident["outcome"], incident["severity"], incident["category"], incident["status"]) == (
        "FAILURE",
        "HIGH",
        "EXECUTION_FAILURE",
        "OPEN",
    )
    assert incident["error_message"] == "no answer within 30 s"
    evaluation = await only_row(engine, "policy_evaluations")
    assert (evaluation["outcome"], evaluation["policies_checked"]) == ("no_violation", 0)
    trace = await only_row(engine, "traces")
    assert (trace["trace_id"], trace["status"], len(trace["steps"])) == (run.trace_id, "failed", 2)
    stored = await only_row(engine, "run_completions")
    assert (stored["phase"], stored["mode"], stored["cost_usd"]) == ("COMMITTED", "atomic", Decimal("0.0125"))
    assert stored["metadata"] == {"region": "eu", "retries": 2}
    async with engine.connect() as conn:
        events = (await conn.execute(select(tables.outbox_events).order_by("sequence"))).mappings().all()
    assert [(event["sequence"], event["routing_key"]) for event in events] == [
        (1, "incident.created.high"),
        (2, "policy.evaluated.no_violation"),
        (3, "run.finalized.failed"),
    ]


@pytest.mark.parametrize("table", ["run_completions", "incidents", "policy_evaluations", "traces", "outbox_events"])
async def test_a_failed_write_leaves_one_rollback_record_and_the_redelivery_succeeds(coordinator, engine, table):
    run = runs.run()
    reached = {
        "run_completions": TransactionPhase.NOT_STARTED,
        "incidents": TransactionPhase.NOT_STARTED,
        "policy_evaluations": TransactionPhase.INCIDENT_CREATED,
        "traces": TransactionPhase.POLICY_EVALUATED,
        "outbox_events": TransactionPhase.TRACE_COMPLETED,
    }[table]
    await break_writes_to(engine, table)

    with pytest.raises(TransactionFailed) as failure:
        await coordinator.execute(run)

    assert failure.value.phase is reached
    assert failure.value.rolled_back
    assert "injected" in str(failure.value)
    for name in DOMAIN_TABLES:
        assert await count(engine, name) == 0, name
    record = await only_row(engine, "rollbacks")
    assert (record["run_id"], record["attempt"], record["phase_reached"]) == (run.run_id, 1, reached.value)
    assert record["error"] == "injected"
    done_before = list(TransactionPhase)[1 : list(TransactionPhase).index(reached) + 1]
    assert [operation.split(":")[0] for operation in record["operations"]] == [p.value for p in reversed(done_before)]

    await repair_writes(engine)
    assert (await coordinator.execute(run)).state == "committed"
    assert await count(engine, "incidents") == 1
    assert await count(engine, "rollbacks") == 1


async def test_a_failed_commit_leaves_no_row_and_one_rollback_record(coordinator, engine):
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "CREATE FUNCTION governance.refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'at commit'; END $$"
            )
        )
        await conn.execute(
            text(
                "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON governance.incidents DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION governance.refuse()"
            )
        )

    with pytest.raises(TransactionFailed) as failure:
        await coordinator.execute(runs.run())

    assert failure.value.phase is TransactionPhase.TRACE_COMPLETED
    assert await count(engine, "run_completions") == 0
    assert (await only_row(engine, "rollbacks"))["phase_reached"] == "TRACE_COMPLETED"


async def test_each_attempt_is_recorded_and_counted(coordinator, engine):
    run = runs.run()
    await break_writes_to(engine, "traces")

    for _ in range(3):
        with pytest.raises(TransactionFailed):
            await coordinator.execute(run)

    async with engine.connect() as conn:
        attempts = (await conn.execute(select(tables.rollbacks.c.attempt).order_by("attempt"))).scalars().all()
    assert attempts == [1, 2, 3]


async def test_a_redelivered_run_is_a_duplicate_and_writes_nothing(coordinator, engine):
    run = runs.run()
    await coordinator.execute(run)
    before = await only_row(engine, "incidents")

    again = await coordinator.execute(run)

    assert (again.state, again.phase, again.results) == ("duplicate", TransactionPhase.COMMITTED, ())
    assert await only_row(engine, "incidents") == before
    assert await count(engine, "outbox_events") == 3


async def test_the_same_run_with_different_content_is_a_conflict_and_writes_nothing(coordinator, engine):
    fields = runs.message()
    await coordinator.execute(_decoded(fields))

    result = await coordinator.execute(_decoded({**fields, "status": "succeeded"}))

    assert result.state == "conflict"
    assert (await only_row(engine, "incidents"))["outcome"] == "FAILURE"


async def test_two_tenants_can_have_runs_and_traces_with_the_same_ids(coordinator, engine):
    fields = runs.message()

    results = await coordinator.execute_many([_decoded(fields), _decoded({**fields, "tenant_id": "other"})])

    assert [result.state for result in results] == ["committed", "committed"]
    assert await count(engine, "traces") == 2


async def test_two_concurrent_transactions_commit_the_same_run_once(engine):
    batch = [runs.run() for _ in range(20)]
    first, second = (create_transaction_coordinator(engine=engine) for _ in range(2))

    one, two = await asyncio.gather(first.execute_many(batch), second.execute_many(list(reversed(batch))))

    states = [{a.state, b.state} for a, b in zip(one, reversed(two), strict=True)]
    assert states == [{"committed", "duplicate"}] * 20
    assert await count(engine, "incidents") == 20
    assert await count(engine, "outbox_events") == 60
    assert await count(engine, "rollbacks") == 0


async def test_a_run_twice_in_one_batch_is_committed_once(coordinator, engine):
    fields = runs.message()
    changed = {**fields, "model": "another"}

    results = await coordinator.execute_many([_decoded(fields), _decoded(fields), _decoded(changed)])

    assert [result.state for result in results] == ["committed", "duplicate", "conflict"]
    assert await count(engine, "run_completions") == 1


async def test_a_repeated_run_in_a_batch_is_compared_with_the_stored_run(coordinator):
    fields = runs.message()
    await coordinator.execute(_decoded(fields))

    results = await coordinator.execute_many([_decoded({**fields, "model": "another"}), _decoded(fields)])

    assert [result.state for result in results] == ["conflict", "duplicate"]


async def test_a_run_without_a_trace_passes_trace_completed_with_a_skipped_result(coordinator, engine):
    result = await coordinator.execute(runs.run(trace_id=None))

    assert result.phase is TransactionPhase.COMMITTED
    assert result.results[2].action == "skipped"
    assert await count(engine, "traces") == 0


async def test_a_running_trace_is_completed(coordinator, engine):
    run = runs.run(status="aborted")
    await _insert_trace(engine, run, status="running")

    result = await coordinator.execute(run)

    trace = await only_row(engine, "traces")
    assert result.results[2].action == "completed"
    assert (trace["status"], trace["completed_at"], len(trace["steps"])) == ("aborted", run.completed_at, 2)


async def test_a_complete_trace_is_never_changed(coordinator, engine):
    run = runs.run(status="failed")
    await _insert_trace(engine, run, status="completed")
    before = await only_row(engine, "traces")

    result = await coordinator.execute(run)

    assert result.results[2].action == "kept"
    assert await only_row(engine, "traces") == before


@pytest.mark.parametrize("status", ["running", "completed"])
async def test_a_trace_of_another_run_is_never_changed(coordinator, engine, status):
    run, other = runs.run(), uuid4()
    await _insert_trace(engine, run, status=status, run_id=other)
    before = await only_row(engine, "traces")

    result = await coordinator.execute(run)

    assert (result.state, result.results[2].action, result.results[2].record_id) == (
        "committed",
        "created",
        run.trace_id,
    )
    found = {row["run_id"]: row for row in await all_rows(engine, "traces")}
    assert found[other] == before
    assert len(found[run.run_id]["steps"]) == len(run.steps)
    assert await finalized_trace_of(engine, run) == str(run.trace_id)


async def test_a_running_trace_of_the_run_under_another_id_is_completed_and_keeps_its_id(coordinator, engine):
    run, opened = runs.run(), uuid4()
    await _insert_trace(engine, run, status="running", trace_id=opened)

    result = (await coordinator.execute(run)).results[2]
    trace = await only_row(engine, "traces")

    assert (result.action, result.record_id) == ("completed", opened)
    assert (trace["trace_id"], trace["status"], len(trace["steps"])) == (opened, "failed", len(run.steps))
    assert await finalized_trace_of(engine, run) == str(opened)


async def test_every_run_of_a_shared_trace_keeps_its_steps(coordinator, engine):
    shared = [str(uuid4()) for _ in range(3)]
    batch = [runs.run(trace_id=shared[number % 3]) for number in range(40)]

    results = await coordinator.execute_many(batch)

    assert {result.results[2].action for result in results} == {"created"}
    stored = {row["run_id"]: row for row in await all_rows(engine, "traces")}
    assert {run.run_id: (run.trace_id, 2) for run in batch} == {
        run_id: (row["trace_id"], len(row["steps"])) for run_id, row in stored.items()
    }


async def test_a_run_without_a_trace_id_names_no_trace_in_its_event(coordinator, engine):
    run = runs.run(trace_id=None)
    assert (await coordinator.execute(run)).results[2].action == "skipped"
    assert await finalized_trace_of(engine, run) is None


async def all_rows(engine: AsyncEngine, table: str) -> list[Any]:
    async with engine.connect() as conn:
        return list((await conn.execute(text(f"SELECT * FROM governance.{table}"))).mappings())


async def finalized_trace_of(engine: AsyncEngine, run: CompletedRun) -> str | None:
    async with engine.connect() as conn:
        body = await conn.execute(
            text("SELECT body FROM governance.outbox_events WHERE run_id = :run AND sequence = 3"), {"run": run.run_id}
        )
    found: str | None = json.loads(body.scalar_one())["data"]["trace_id"]
    return found


async def test_cancelling_a_transaction_rolls_it_back_and_leaves_no_session(coordinator, engine):
    run = runs.run()
    before = await _sessions(engine)
    async with engine.connect() as blocker:
        await blocker.execute(text("LOCK TABLE governance.policy_evaluations IN ACCESS EXCLUSIVE MODE"))
        task = asyncio.create_task(coordinator.execute(run))
        await _until_waiting(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await blocker.rollback()

    for name in DOMAIN_TABLES:
        assert await count(engine, name) == 0, name
    assert (await only_row(engine, "rollbacks"))["phase_reached"] == "INCIDENT_CREATED"
    assert (await coordinator.execute(run)).state == "committed"
    assert await _sessions(engine) <= before + 2


async def test_cancelling_a_rollback_does_not_return_its_session_to_the_pool(database_url, postgres):
    class Waits(PolicyBook):
        async def current(self, conn: AsyncConnection) -> PolicySet:
            at_the_policies.set()
            return await asyncio.Future()

    at_the_policies = asyncio.Event()
    proxy = await Proxy(postgres.port).accept()
    session = create_engine(database_url.replace(str(postgres.port), str(proxy.port)), pool_size=1, by_key=True)
    task = asyncio.create_task(RunCompletionTransaction(engine=session, policies=Waits()).execute(runs.run()))
    await at_the_policies.wait()
    proxy.stall(new_connections_too=False)
    task.cancel()
    await asyncio.sleep(0.05)  # the rollback waits for its response
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    coordinator = create_transaction_coordinator(engine=session)
    done = await asyncio.wait_for(coordinator.execute_many([runs.run(), runs.run()]), PATIENCE)

    assert [result.state for result in done] == ["committed"] * 2
    await session.dispose()
    proxy.close()


async def test_a_commit_that_times_out_is_not_reported_as_rolled_back(database_url, engine):
    """The driver times out and requests a cancellation; this server commits in spite of it."""
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "CREATE FUNCTION governance.linger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "PERFORM pg_sleep(60); RETURN NULL; EXCEPTION WHEN query_canceled THEN RETURN NULL; END $$"
            )
        )
        await conn.execute(
            text(
                "CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON governance.incidents DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION governance.linger()"
            )
        )
    impatient = create_engine(database_url, pool_size=2, by_key=True, command_timeout=1)
    coordinator, run = create_transaction_coordinator(engine=impatient), runs.run()

    with pytest.raises(TransactionFailed) as failure:
        await coordinator.execute(run)

    assert not failure.value.rolled_back
    assert fault_of(failure.value) is Fault.TRANSIENT
    assert (await coordinator.execute(run)).state == "duplicate"
    assert await count(engine, "outbox_events") == 3
    await impatient.dispose()


async def test_an_unavailable_database_fails_the_transaction_as_transient_before_it_starts():
    coordinator = create_transaction_coordinator(database_url="postgresql://nobody@127.0.0.1:1/nothing")

    with pytest.raises(TransactionFailed) as failure:
        await coordinator.execute(runs.run())

    assert failure.value.phase is TransactionPhase.NOT_STARTED


async def test_every_value_of_a_valid_message_can_be_stored(coordinator, engine):
    run = runs.run(
        error_message="\x01\x7f\ud7ff😀" + "x" * 500_000,
        usage={"cost_usd": 999999999999.0123456789, "input_tokens": 2**63 - 1, "output_tokens": 0},
        started_at="0001-01-02T00:00:00Z",
        completed_at="9999-12-30T23:59:59.999999Z",
        metadata={"big": 10**300, "tiny": 1e-300, "yes": True, "none": None, "ключ": "значение"},
        steps=[{"index": 2**31 - 1, "status": "skipped", "duration_ms": 2**63 - 1, "cost_usd": 1e-30}],
    )

    await coordinator.execute(run)

    stored = await only_row(engine, "run_completions")
    assert stored["input_tokens"] == 2**63 - 1
    assert (stored["started_at"], stored["completed_at"]) == (run.started_at, run.completed_at)
    assert (await only_row(engine, "incidents"))["error_message"] == run.error_message


async def test_an_arrival_stores_the_properties_of_its_message(coordinator, engine):
    arrival = Arrival.of(runs.run())._replace(message_id="m-1", digest=b"d" * 32)

    await coordinator.execute(arrival)

    stored = await only_row(engine, "run_completions")
    assert (stored["message_id"], bytes(stored["payload_digest"])) == ("m-1", b"d" * 32)


def _decoded(fields: dict[str, Any]) -> CompletedRun:
    import msgspec

    return msgspec.json.decode(runs.body(fields), type=CompletedRun)


async def _insert_trace(
    engine: AsyncEngine, run: CompletedRun, *, status: str, run_id: UUID | None = None, trace_id: UUID | None = None
) -> None:
    async with engine.begin() as conn:
        await conn.execute(
            tables.traces.insert().values(
                tenant_id=run.tenant_id,
                trace_id=trace_id or run.trace_id,
                run_id=run_id or run.run_id,
                status=status,
                started_at=run.started_at,
            )
        )


async def _sessions(engine: AsyncEngine) -> int:
    async with engine.connect() as conn:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        return int((await conn.execute(text(query))).scalar_one())


async def _until_waiting(engine: AsyncEngine) -> None:
    query = text(
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    await eventually(engine, query, expected=True)


async def test_only_the_published_mark_commits_without_waiting_for_the_disk(database_url, engine, broker):
    """Read where rows are written: synchronous_commit is a setting of the transaction."""
    async with engine.begin() as conn:
        await conn.execute(text("CREATE TABLE seen (at text, setting text)"))
        await conn.execute(
            text(
                "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "INSERT INTO seen VALUES (TG_OP, current_setting('synchronous_commit')); RETURN NULL; END $$"
            )
        )
        await conn.execute(
            text(
                "CREATE TRIGGER see AFTER INSERT OR UPDATE ON governance.run_completions "
                "FOR EACH ROW EXECUTE FUNCTION see()"
            )
        )
    closing_out = create_engine(database_url, pool_size=1, by_key=True)
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=Metrics())
    coordinator = RunCompletionTransaction(engine=closing_out, policies=PolicyBook(), publisher=publisher)
    for _ in range(2):
        await coordinator.execute(runs.run())
    await closing_out.dispose()

    async with engine.connect() as conn:
        seen = [tuple(row) for row in await conn.execute(text("SELECT at, setting FROM seen"))]
    assert seen == [("INSERT", "on"), ("UPDATE", "off")] * 2
