"""The worker's spans, by OpenTelemetry's messaging conventions. Imports OpenTelemetry's API.

A batch has one ``receive`` span with a link to each message's span. A run has one ``process`` span, a child of its
message's span and so part of the runner's trace, with a link to the batch's span. Work for the whole batch (each
transaction with its phases, the ``publish`` of its events) is below the batch's span and linked to each run's. If a
batch is a single run, everything is below that run's span.

Spans carry tenant, run and error classes. They carry no error text, because it may quote the run.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import time_ns
from urllib.parse import urlsplit

from opentelemetry.trace import (
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    set_span_in_context,
    use_span,
)

from consumer.closeout.inbox import Arrival
from consumer.closeout.outcome import CloseOut, Failed, Outcome, TransactionFailed, TransactionResult
from consumer.contract.events import OutboxEvent
from consumer.contract.names import EVENTS_EXCHANGE, RUN_COMPLETED_KEY, RUN_COMPLETED_QUEUE, RUNS_EXCHANGE
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.trace_context import context_in
from consumer.delivery.intake import Delivery
from consumer.errors import sqlstate_of
from consumer.outbox.publisher import OnFailure
from consumer.phases import OnPhase, TransactionPhase
from consumer.tracing.span_contexts import below, links, nanoseconds, span_context, trace_of
from consumer.version import installed_version

_Decode = Callable[[Delivery], Arrival]
_Attributes = dict[str, str | int]
# Exchange, routing key and queue: a consumer's destination in the RabbitMQ conventions.
_SOURCE = f"{RUNS_EXCHANGE}:{RUN_COMPLETED_KEY}:{RUN_COMPLETED_QUEUE}"
_FROM: _Attributes = {
    "messaging.system": "rabbitmq",
    "messaging.destination.name": _SOURCE,
    "messaging.rabbitmq.destination.routing_key": RUN_COMPLETED_KEY,
}
_RECEIVE = _FROM | {"messaging.operation.type": "receive", "messaging.operation.name": "receive"}
_PROCESS = _FROM | {"messaging.operation.type": "process", "messaging.operation.name": "process"}
_PUBLISH: _Attributes = {
    "messaging.system": "rabbitmq",
    "messaging.destination.name": EVENTS_EXCHANGE,  # a batch's events have many routing keys
    "messaging.operation.type": "send",
    "messaging.operation.name": "publish",
}
_PORTS = {"amqp": 5672, "amqps": 5671}
_COUNT = "messaging.batch.message_count"
_UNDONE = {TransactionPhase.ROLLED_BACK, TransactionPhase.FAILED}


class Spans:
    """Makes the worker's spans with *provider*; *amqp_url* gives the server attributes."""

    def __init__(self, provider: TracerProvider, *, amqp_url: str, close: Callable[[], Awaitable[None]]) -> None:
        self._tracer = provider.get_tracer("closeout", installed_version())
        server = _server(amqp_url)
        self._receive_attributes, self._process_attributes = _RECEIVE | server, _PROCESS | server
        self._publish_attributes = _PUBLISH | server
        self._close = close

    async def close(self) -> None:
        """Send the remaining spans, within a bounded time."""
        await self._close()

    def decoding(self, decode: _Decode) -> _Decode:
        """Wrap *decode*: a refused message gets a span in the sender's trace."""

        def traced(delivery: Delivery) -> Arrival:
            try:
                return decode(delivery)
            except Exception as error:
                properties = delivery.message.header.properties
                sender = span_context(context_in(properties.headers), is_remote=True)
                span = self._tracer.start_span(
                    f"process {_SOURCE}",
                    context=below(sender),
                    kind=SpanKind.CONSUMER,
                    attributes=self._process_attributes | _message_id(properties.message_id),
                    links=links([sender]),
                    start_time=nanoseconds(delivery.received_at),
                )
                _fail(span, error)
                span.end()
                raise

        return traced

    def closing_out(self, close_out: CloseOut) -> CloseOut:
        """Wrap *close_out*: a ``receive`` span per batch and a ``process`` span per run."""

        async def traced(arrivals: Sequence[Arrival]) -> Sequence[Outcome]:
            senders = [span_context(arrival.trace, is_remote=True) for arrival in arrivals]
            received = self._receive(arrivals, senders)
            processes = [self._process(*each, received, len(arrivals)) for each in zip(arrivals, senders, strict=True)]
            belonging = [
                arrival._replace(trace=trace_of(span)) for arrival, span in zip(arrivals, processes, strict=True)
            ]
            try:
                with _current(processes[0] if len(processes) == 1 else received):
                    outcomes = await close_out(belonging)
            except BaseException as error:
                outcomes = [Failed(error)] * len(processes)
                raise
            finally:
                for span, outcome in zip(processes, outcomes, strict=True):
                    _conclude(span, outcome)
            return outcomes

        return traced

    def _receive(self, arrivals: Sequence[Arrival], senders: Sequence[SpanContext | None]) -> Span:
        span = self._tracer.start_span(
            f"receive {_SOURCE}",
            context=below(senders[0] if len(senders) == 1 else None),
            kind=SpanKind.CLIENT,
            attributes=self._receive_attributes | {_COUNT: len(arrivals)},
            links=links(senders),
            start_time=nanoseconds(min(arrival.received_at for arrival in arrivals)),
        )
        span.end()
        return span

    def _process(self, arrival: Arrival, sender: SpanContext | None, received: Span, batch: int) -> Span:
        batch_span = received.get_span_context()
        return self._tracer.start_span(
            f"process {_SOURCE}",
            context=below(sender or (batch_span if batch == 1 else None)),
            kind=SpanKind.CONSUMER,
            attributes=self._process_attributes | _message_id(arrival.message_id) | _identity(arrival),
            links=links([sender, batch_span]),
        )

    @contextmanager
    def attempt(self, arrivals: Sequence[Arrival], mode: str) -> Iterator[OnPhase]:
        """Open a span for one transaction over *arrivals*; yield a function that adds a span for each phase.

        A phase's span starts at the previous phase; the first one starts with the wait for a connection.
        """
        runs = [span_context(arrival.trace, is_remote=False) for arrival in arrivals]
        alone = runs[0] if len(runs) == 1 else None
        span = self._tracer.start_span(
            "close out",
            context=below(alone) if alone else None,
            attributes={"closeout.mode": mode, "closeout.runs": len(arrivals)},
            links=() if alone else links(runs),
        )
        context, since = set_span_in_context(span), [time_ns()]

        def entered(phase: TransactionPhase) -> None:
            now = time_ns()
            made = self._tracer.start_span(phase.value, context=context, start_time=since[0])
            if phase in _UNDONE:
                made.set_status(Status(StatusCode.ERROR))
            made.end(now)
            since[0] = now

        with _ending(span):
            yield entered

    @contextmanager
    def sending(self, events: Sequence[OutboxEvent]) -> Iterator[OnFailure]:
        """Open a span for one write of *events* and the wait for their confirms, linked to each run's span."""
        runs = {event.key: span_context(event.trace, is_remote=False) for event in events}
        span = self._tracer.start_span(
            f"publish {EVENTS_EXCHANGE}",
            kind=SpanKind.CLIENT,  # PRODUCER is the span that the messages name
            attributes=self._publish_attributes | {_COUNT: len(events)},
            links=links(runs.values()),
        )

        def failed(why: str) -> None:
            span.set_status(Status(StatusCode.ERROR, why))
            span.set_attribute("error.type", "unconfirmed")

        with _ending(span):
            yield failed


def _current(span: Span) -> AbstractContextManager[Span]:
    """Make *span* the current span; the text of an exception is not recorded."""
    return use_span(span, record_exception=False, set_status_on_exception=False)


@contextmanager
def _ending(span: Span) -> Iterator[None]:
    with _current(span):
        try:
            yield
        except BaseException as error:
            _fail(span, error)
            raise
        finally:
            span.end()


def _conclude(span: Span, outcome: Outcome) -> None:
    match outcome:
        case TransactionResult(state="committed" | "duplicate"):
            span.set_attribute("closeout.result", outcome.state)
            span.set_attribute("closeout.phase", outcome.phase.value)
        case TransactionResult():
            span.set_attribute("closeout.result", outcome.state)
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", outcome.state)
        case Failed(error):
            _fail(span, error)
    span.end()


def _fail(span: Span, error: BaseException) -> None:
    """Mark *span* as failed with an error type: a refusal's reason, a SQLSTATE, or a class."""
    description, cause = None, error
    if isinstance(error, TransactionFailed):
        description, cause = f"rolled back at {error.phase}", error.cause
    kind = cause.reason if isinstance(cause, MessageRefusedError) else sqlstate_of(cause) or type(cause).__name__
    span.set_status(Status(StatusCode.ERROR, description))
    span.set_attribute("error.type", kind)


def _server(amqp_url: str) -> _Attributes:
    parts = urlsplit(amqp_url)
    return {"server.address": parts.hostname or "", "server.port": parts.port or _PORTS[parts.scheme]}


def _identity(arrival: Arrival) -> _Attributes:
    return {"closeout.tenant_id": arrival.run.tenant_id, "closeout.run_id": str(arrival.run.run_id)}


def _message_id(message_id: str | None) -> _Attributes:
    return {"messaging.message.id": message_id} if message_id else {}
