"""The propagation of a runner's trace through a close-out into its events, and the spans with OpenTelemetry."""

import json
from typing import Any

import pytest
from aiormq.abc import DeliveredMessage
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import TransactionFailed, create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.outcome import Failed, Outcome
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.contract.names import RETRY_QUEUE
from consumer.contract.trace_context import TraceContext, context_in
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from consumer.parked.copies import headers_of, retry_later
from consumer.tracing.spans import Spans
from domains.policies.book import PolicyBook
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, count
from tests.support.traffic import emptied, eventually, listen, parked, publish, published_runs, received, worker

SENDER = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1")
OTHER = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
PHASES = ["INCIDENT_CREATED", "POLICY_EVALUATED", "TRACE_COMPLETED", "COMMITTED"]
SOURCE = "runs:run.completed:closeout.run-completed"


def named(event: DeliveredMessage) -> TraceContext | None:
    """Return the trace in an event's body, which must equal that in its headers."""
    context = context_in(json.loads(event.body))
    assert context_in(headers_of(event)) == context
    return context


def arrival(trace: TraceContext | None, **changes: Any) -> Arrival:
    return Arrival.of(runs.run(**changes))._replace(trace=trace)


@pytest.mark.parametrize("atomic", ["true", "false"])
async def test_each_event_has_its_runners_traceparent_and_an_invalid_one_is_ignored(
    database_url, amqp_url, engine, broker, atomic
):
    events = await listen(broker)
    sent: list[tuple[dict[str, Any] | None, TraceContext | None]] = [
        ({"traceparent": SENDER.traceparent, "tracestate": "vendor=1", "n": 5}, SENDER),
        ({"traceparent": bytearray(OTHER.traceparent.encode())}, OTHER),
        ({"traceparent": SENDER.traceparent + "-"}, None),
        ({"traceparent": {"of": ["another", "type"]}}, None),
        (None, None),
    ]
    expected: dict[str, TraceContext | None] = {}
    async with worker(database_url, amqp_url, TRANSACTION_COORDINATOR_ENABLED=atomic):
        for headers, trace in sent:
            body = runs.body()
            expected[str(runs.run_id_of(body))] = trace
            await publish(broker, body, headers=headers)
        await eventually(engine, published_runs(), len(sent))
    assert len(await received(events, 3 * len(sent))) == 3 * len(sent)
    for event in events:
        assert named(event) == expected[str(event.header.properties.correlation_id)]


async def test_events_published_by_a_relay_have_their_traceparent(engine, broker):
    await create_transaction_coordinator(engine=engine).execute_many([arrival(SENDER), arrival(None)])
    events = await listen(broker)
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=Metrics())
    await Relay(engine=engine, publisher=publisher, metrics=Metrics(), grace_seconds=0.0).sweep()
    await received(events, 6)
    assert sorted(map(named, events), key=str) == [None] * 3 + [SENDER] * 3


async def test_a_resent_run_with_another_traceparent_is_a_duplicate(database_url, amqp_url, engine, broker):
    events, body = await listen(broker), runs.body()
    async with worker(database_url, amqp_url):
        await publish(broker, body, headers=SENDER.headers)
        await eventually(engine, published_runs(), 1)
        await publish(broker, body, headers=OTHER.headers)
        await publish(broker, runs.body())
        await eventually(engine, published_runs(), 2)
    assert await emptied(broker, "closeout.parked") == []
    assert [named(event) for event in (await received(events, 6))[:3]] == [SENDER] * 3


async def test_a_copy_in_the_retry_queue_keeps_its_trace(broker):
    await publish(broker, runs.body(), headers=SENDER.headers)
    (message,) = await emptied(broker, "closeout.run-completed")
    await retry_later(ConfirmedChannel(broker), message, attempts=1, error="unforeseen")
    (copy,) = await parked(broker, 1, queue=RETRY_QUEUE)
    assert context_in(headers_of(copy)) == SENDER


# With OpenTelemetry.


class Recorder(Spans):
    """Spans kept in memory."""

    def __init__(self, **provider: Any) -> None:
        self.kept = InMemorySpanExporter()
        made = TracerProvider(**provider)
        made.add_span_processor(SimpleSpanProcessor(self.kept))
        super().__init__(made, amqp_url="amqps://user:a-secret@broker.example", close=self._nothing)

    async def _nothing(self) -> None:
        pass

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.kept.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def everything(self) -> str:
        return "".join(span.to_json() for span in self.kept.get_finished_spans())


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def trace_of(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


def context_of(span: ReadableSpan) -> str:
    return f"00-{trace_of(span)}-{span.context.span_id:016x}-01"


def parent_of(span: ReadableSpan) -> str | None:
    return span.parent and f"00-{span.parent.trace_id:032x}-{span.parent.span_id:016x}-01"


def links_of(span: ReadableSpan) -> list[str]:
    return [f"00-{link.context.trace_id:032x}-{link.context.span_id:016x}-01" for link in span.links]


def coordinator(engine: AsyncEngine, broker: BrokerConnection, recorder: Recorder) -> RunCompletionTransaction:
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=Metrics(), observe=recorder.sending)
    return RunCompletionTransaction(engine=engine, policies=PolicyBook(), publisher=publisher, observe=recorder.attempt)


async def test_a_batch_of_one_run_is_recorded_in_its_runners_trace(database_url, amqp_url, engine, broker, recorder):
    events = await listen(broker)
    body = runs.body()
    async with worker(database_url, amqp_url, recorder):
        await publish(broker, body, headers=SENDER.headers, message_id="m-1")
        await eventually(engine, published_runs(), 1)
    spans = recorder.kept.get_finished_spans()
    assert {trace_of(span) for span in spans} == {SENDER.traceparent[3:35]}
    receive, process = recorder.one(f"receive {SOURCE}"), recorder.one(f"process {SOURCE}")
    attempt, send = recorder.one("close out"), recorder.one("publish governance.events")
    assert parent_of(receive) == parent_of(process) == SENDER.traceparent
    assert parent_of(attempt) == context_of(process)
    assert [parent_of(recorder.one(phase)) for phase in PHASES] == [context_of(attempt)] * 4
    assert parent_of(send) == context_of(attempt)
    assert [span.kind for span in (receive, process, attempt, send)] == [
        SpanKind.CLIENT,
        SpanKind.CONSUMER,
        SpanKind.INTERNAL,
        SpanKind.CLIENT,
    ]
    assert all(span.status.status_code is StatusCode.UNSET for span in spans)
    assert links_of(receive) == [SENDER.traceparent]
    assert links_of(process) == [SENDER.traceparent, context_of(receive)]
    assert links_of(send) == [context_of(process)]
    # A subscriber's span joins the runner's trace below ours, with the vendors' tracestate.
    assert {named(event) for event in await received(events, 3)} == {TraceContext(context_of(process), "vendor=1")}
    assert process.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": SOURCE,
        "messaging.rabbitmq.destination.routing_key": "run.completed",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.message.id": "m-1",
        "server.address": "broker.example",
        "server.port": 5671,
        "closeout.tenant_id": "acme",
        "closeout.run_id": str(runs.run_id_of(body)),
        "closeout.result": "committed",
        "closeout.phase": "EVENTS_PUBLISHED",
    }
    assert send.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": "governance.events",
        "messaging.operation.type": "send",
        "messaging.operation.name": "publish",
        "messaging.batch.message_count": 3,
        "server.address": "broker.example",
        "server.port": 5671,
    }


async def test_a_batch_has_a_separate_trace_with_links_to_each_runners_trace(engine, broker, recorder):
    events = await listen(broker)
    batch = [arrival(SENDER), arrival(OTHER), arrival(None)]
    outcomes = await recorder.closing_out(coordinator(engine, broker, recorder).execute_many)(batch)
    assert [outcome.state for outcome in outcomes] == ["committed"] * 3
    receive, attempt, send = map(recorder.one, (f"receive {SOURCE}", "close out", "publish governance.events"))
    processes = {span.attributes["closeout.run_id"]: span for span in recorder.named(f"process {SOURCE}")}
    in_order = [processes[str(each.run.run_id)] for each in batch]
    assert receive.parent is None
    assert receive.attributes["messaging.batch.message_count"] == 3
    assert links_of(receive) == [SENDER.traceparent, OTHER.traceparent]
    assert [parent_of(span) for span in in_order] == [SENDER.traceparent, OTHER.traceparent, None]
    assert all(context_of(receive) in links_of(span) for span in in_order)
    assert len({trace_of(span) for span in (*in_order, receive)}) == 4
    assert parent_of(attempt) == context_of(receive)
    assert [parent_of(recorder.one(phase)) for phase in PHASES] == [context_of(attempt)] * 4
    assert links_of(attempt) == links_of(send) == [context_of(span) for span in in_order]
    await received(events, 9)
    for event in events:
        trace = named(event)
        assert trace is not None
        assert trace.traceparent[:52] == context_of(processes[str(event.header.properties.correlation_id)])[:52]


async def test_phase_spans_are_consecutive_within_their_transaction(engine, broker, recorder):
    await coordinator(engine, broker, recorder).execute(runs.run())
    attempt = recorder.one("close out")
    moments = [attempt.start_time]
    for phase in map(recorder.one, PHASES):
        assert phase.start_time >= moments[-1]
        moments.append(phase.end_time)
    assert moments == sorted(moments)
    assert moments[-1] <= attempt.end_time


@pytest.mark.parametrize("runs_at_once", [1, 3])
async def test_a_rollback_is_an_error_in_the_spans_of_its_run_transaction_and_phase(
    engine, broker, recorder, runs_at_once
):
    await break_writes_to(engine, "policy_evaluations", message="a secret of the tenant")
    execute = coordinator(engine, broker, recorder).execute_many

    async def close_out(arrivals: Any) -> list[Outcome]:
        with pytest.raises(TransactionFailed) as failure:
            await execute(arrivals)
        return [Failed(failure.value)] * len(arrivals)

    await recorder.closing_out(close_out)([arrival(SENDER) for _ in range(runs_at_once)])
    failed = [recorder.one("close out"), *recorder.named(f"process {SOURCE}")]
    assert len(failed) == 1 + runs_at_once
    for span in failed:
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "rolled back at INCIDENT_CREATED"
        assert span.attributes["error.type"] == "P0001"
    assert recorder.one("ROLLED_BACK").status.status_code is StatusCode.ERROR
    assert recorder.named("POLICY_EVALUATED") == recorder.named("COMMITTED") == []
    assert "secret" not in recorder.everything()


async def test_a_refused_message_is_an_error_in_its_senders_trace(database_url, amqp_url, broker, recorder):
    async with worker(database_url, amqp_url, recorder):
        await publish(broker, runs.body(status="secret"), headers=SENDER.headers, message_id="m-1")
        await parked(broker, 1)
    process = recorder.one(f"process {SOURCE}")
    assert parent_of(process) == SENDER.traceparent
    assert process.status.status_code is StatusCode.ERROR
    assert process.attributes["error.type"] == "schema_violation"
    assert process.attributes["messaging.message.id"] == "m-1"
    assert "secret" not in recorder.everything()


async def test_a_conflict_is_an_error_span_and_a_duplicate_is_not(engine, broker, recorder):
    fields = runs.message()
    close_out = recorder.closing_out(coordinator(engine, broker, recorder).execute_many)
    for changes in ({}, {}, {"model": "other"}):
        await close_out([arrival(SENDER, **{**fields, **changes})])
    first, again, conflict = recorder.named(f"process {SOURCE}")
    assert [span.attributes["closeout.result"] for span in (first, again, conflict)] == [
        "committed",
        "duplicate",
        "conflict",
    ]
    assert [span.status.status_code for span in (first, again, conflict)] == [
        StatusCode.UNSET,
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]


async def test_unpublished_events_are_an_error_of_the_publish_span_only(engine, recorder):
    away = BrokerConnection("amqp://127.0.0.1:1/", name="away")
    await recorder.closing_out(coordinator(engine, away, recorder).execute_many)([arrival(SENDER)])
    send = recorder.one("publish governance.events")
    assert send.status.status_code is StatusCode.ERROR
    assert send.attributes["error.type"] == "unconfirmed"
    assert recorder.one("close out").status.status_code is StatusCode.UNSET
    assert recorder.one(f"process {SOURCE}").attributes["closeout.phase"] == "COMMITTED"


async def test_a_relays_publish_span_links_to_the_runs_of_its_events(engine, broker, recorder):
    await create_transaction_coordinator(engine=engine).execute_many([arrival(SENDER), arrival(OTHER), arrival(None)])
    publisher = EventPublisher(ConfirmedChannel(broker), metrics=Metrics(), observe=recorder.sending)
    await Relay(engine=engine, publisher=publisher, metrics=Metrics(), grace_seconds=0.0).sweep()
    publish_span = recorder.one("publish governance.events")
    assert publish_span.parent is None
    assert sorted(links_of(publish_span)) == sorted([SENDER.traceparent, OTHER.traceparent])


async def test_the_legacy_path_records_its_phases(engine, recorder):
    legacy = LegacyCloseOut(engine=engine, policies=PolicyBook(), observe=recorder.attempt)

    async def close_out(arrivals: Any) -> list[Outcome]:
        return [await legacy.execute(each) for each in arrivals]

    await recorder.closing_out(close_out)([arrival(SENDER)])
    attempt = recorder.one("close out")
    assert attempt.attributes["closeout.mode"] == "legacy"
    assert [parent_of(recorder.one(phase)) for phase in PHASES] == [context_of(attempt)] * 4
    assert {trace_of(span) for span in recorder.kept.get_finished_spans()} == {SENDER.traceparent[3:35]}


async def test_an_unsampled_trace_is_not_recorded_and_its_events_stay_unsampled(engine, broker):
    recorder = Recorder(sampler=ParentBased(TraceIdRatioBased(1)))
    events = await listen(broker)
    unsampled = TraceContext(SENDER.traceparent[:-2] + "00")
    await recorder.closing_out(coordinator(engine, broker, recorder).execute_many)([arrival(unsampled)])
    await received(events, 3)
    assert recorder.kept.get_finished_spans() == ()
    for event in events:
        trace = named(event)
        assert trace is not None
        assert trace.traceparent.startswith(SENDER.traceparent[:35])
        assert trace.traceparent.endswith("-00")
    assert await count(engine, "outbox_events") == 0
