"""Random crashes, duplicates and interleavings of coordinator and relay, on a real database and a real broker.

Hypothesis chooses the next step; after each one, every run must be in one of the three permitted states.
"""

import asyncio
from collections import defaultdict
from typing import Any
from uuid import UUID

import msgspec
from aiormq.abc import DeliveredMessage
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, text

from consumer import TransactionFailed
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from consumer.postgres.engine import create_engine
from domains import tables
from domains.policies.book import PolicyBook
from domains.run import RunKey
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, repair_writes
from tests.support.traffic import listen
from tests.support.waiting import until

TABLES = ("run_completions", "incidents", "policy_evaluations", "traces", "outbox_events")


class CloseOut(RuleBasedStateMachine):
    """Runs arrive, are redelivered, fail, are published or not; several workers act concurrently."""

    database_url = amqp_url = ""
    arrivals = Bundle("arrivals")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.broken: str | None = None
        self.known: dict[RunKey, bytes] = {}
        self.ids: dict[RunKey, dict[int, UUID]] = defaultdict(dict)
        self.events: list[DeliveredMessage] = []

    def do(self, work: Any) -> Any:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        async def build() -> None:
            self.engine = create_engine(self.database_url, pool_size=6)
            async with self.engine.begin() as conn:
                await conn.execute(text("TRUNCATE " + ", ".join(f"governance.{table}" for table in TABLES)))
                await conn.execute(text("DROP FUNCTION IF EXISTS governance.refuse CASCADE"))
            self.broker = BrokerConnection(self.amqp_url, name="state machine")
            await declare(self.broker)
            self.events = await listen(self.broker)
            publisher = EventPublisher(ConfirmedChannel(self.broker), metrics=Metrics())
            book = PolicyBook()
            self.workers = [
                RunCompletionTransaction(engine=self.engine, policies=book, publisher=publisher) for _ in "ab"
            ]
            self.crashing = RunCompletionTransaction(engine=self.engine, policies=book)  # crashes before it publishes
            self.legacy = LegacyCloseOut(engine=self.engine, policies=book, publisher=publisher)
            self.relays = [
                Relay(engine=self.engine, publisher=publisher, metrics=Metrics(), grace_seconds=0) for _ in "ab"
            ]
            self.publisher = publisher

        self.do(build())

    @rule(target=arrivals, traced=st.booleans(), status=st.sampled_from(["succeeded", "failed", "halted"]))
    def a_run_arrives(self, *, traced: bool, status: str) -> Arrival:
        changes: dict[str, Any] = {"status": status} if traced else {"status": status, "trace_id": None}
        return Arrival.of(runs.run(**changes))

    def deliver(self, worker: RunCompletionTransaction, batch: list[Arrival]) -> None:
        try:
            for arrival, result in zip(batch, self.do(worker.execute_many(batch)), strict=True):
                if result.state in {"committed", "duplicate"}:
                    self.known.setdefault(arrival.key, arrival.digest)
        except TransactionFailed:
            assert self.broken is not None

    @rule(batch=st.lists(arrivals, min_size=1, max_size=5))
    def a_worker_takes_a_batch(self, batch: list[Arrival]) -> None:
        self.deliver(self.workers[0], batch)

    @rule(batch=st.lists(arrivals, min_size=1, max_size=5))
    def a_worker_commits_and_dies(self, batch: list[Arrival]) -> None:
        self.deliver(self.crashing, batch)

    @rule(arrival=arrivals)
    def another_content_comes_under_the_same_identity(self, arrival: Arrival) -> None:
        changed = Arrival.of(msgspec.structs.replace(arrival.run, model="another"))
        if arrival.key in self.known:
            result = self.do(self.workers[0].execute(changed))
            assert result.state == "conflict"

    @rule(batch=st.lists(arrivals, min_size=1, max_size=5))
    def two_workers_take_the_same_batch_at_once(self, batch: list[Arrival]) -> None:
        async def both() -> Any:
            return await asyncio.gather(
                self.workers[0].execute_many(batch), self.workers[1].execute_many(batch[::-1]), return_exceptions=True
            )

        for outcome in self.do(both()):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, TransactionFailed)
                assert self.broken is not None
            else:
                assert {result.state for result in outcome} <= {"committed", "duplicate", "unfinished"}
        self.known.update({arrival.key: arrival.digest for arrival in batch if self.broken is None})

    @rule(arrival=arrivals)
    def the_legacy_path_takes_one(self, arrival: Arrival) -> None:
        try:
            self.do(self.legacy.execute(arrival))
        except TransactionFailed:
            assert self.broken is not None

    @rule()
    def events_go_out_and_the_worker_dies_before_the_mark(self) -> None:
        async def publish() -> None:
            from consumer.outbox.store import unpublished

            async with self.engine.connect() as conn:
                found = await unpublished(conn, list(self.known) or [RunKey("x", UUID(int=0))])
                await self.publisher.publish(found.events)

        self.do(publish())

    @rule()
    def two_relays_sweep_at_once(self) -> None:
        async def both() -> None:
            await asyncio.gather(*(relay.sweep() for relay in self.relays))

        self.do(both())

    @rule(table=st.sampled_from(["incidents", "policy_evaluations", "traces", "outbox_events"]))
    def writes_begin_to_fail(self, table: str) -> None:
        if self.broken is None:
            self.do(break_writes_to(self.engine, table))
            self.broken = table

    @rule()
    def writes_are_mended(self) -> None:
        if self.broken is not None:
            self.do(repair_writes(self.engine))
            self.broken = None

    @rule(arrival=consumes(arrivals))
    def a_run_is_never_heard_of_again(self, arrival: Arrival) -> None:
        """Never redeliver it: the invariants must hold without a redelivery."""

    @invariant()
    def every_run_is_whole_or_absent_and_no_event_changes_its_id(self) -> None:
        if hasattr(self, "engine"):
            self.do(self._check())

    async def _check(self) -> None:
        async with self.engine.connect() as conn:
            rows: dict[str, dict[RunKey, list[Any]]] = {}
            for table in TABLES:
                rows[table] = defaultdict(list)
                for row in await conn.execute(select(getattr(tables, table))):
                    rows[table][RunKey(row.tenant_id, row.run_id)].append(row)
        inbox = rows["run_completions"]
        for key, (row,) in inbox.items():
            left = [event.sequence for event in sorted(rows["outbox_events"][key], key=lambda event: event.sequence)]
            if row.committed_at is None:
                assert (row.mode, left) == ("legacy", [])  # unfinished and reported
                continue
            assert len(rows["incidents"][key]) == len(rows["policy_evaluations"][key]) == 1
            assert left == [1, 2, 3][3 - len(left) :]
            assert (row.phase == "EVENTS_PUBLISHED") == (left == []) == (row.events_published_at is not None)
            for event in rows["outbox_events"][key]:
                assert self.ids[key].setdefault(event.sequence, event.event_id) == event.event_id
        for table in TABLES[1:]:
            assert {key for key, found in rows[table].items() if found} <= set(inbox)
        assert {key for key in self.known if key not in inbox} == set()

    def _completely_published(self) -> set[str]:
        """Return the runs whose three events have arrived, each with one id however often."""
        ids_of: dict[str, dict[str, str]] = defaultdict(dict)
        for event in self.events:
            properties = event.header.properties
            kind, event_id = str(properties.message_type), str(properties.message_id)
            assert ids_of[str(properties.correlation_id)].setdefault(kind, event_id) == event_id
        return {run for run, kinds in ids_of.items() if len(kinds) == 3}

    def teardown(self) -> None:
        async def settle() -> None:
            if self.broken is not None:
                await repair_writes(self.engine)
            while await self.relays[0].sweep():
                pass
            async with self.engine.connect() as conn:
                committed = tables.run_completions.c.committed_at.is_not(None)
                found = await conn.execute(select(tables.run_completions.c.run_id).where(committed))
                finished = {str(run_id) for run_id in found.scalars()}
            # A confirmed event may not have arrived yet.
            await until(lambda: finished <= self._completely_published(), what="the events of every finished run")
            assert finished == self._completely_published()
            await self.broker.close()
            await self.engine.dispose()

        if hasattr(self, "engine"):
            self.do(settle())
        self.runner.close()


def test_no_interleaving_of_crashes_duplicates_and_relays_breaks_an_invariant(database_url, bare_amqp_url):
    CloseOut.database_url, CloseOut.amqp_url = database_url, bare_amqp_url
    run_state_machine_as_test(
        CloseOut,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
