"""Converts trace contexts between messages and OpenTelemetry. Imports OpenTelemetry's API."""

from collections.abc import Iterable
from datetime import datetime

from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, TraceFlags, TraceState, set_span_in_context

from consumer.contract.trace_context import TRACESTATE_CHARACTERS_MAX, TraceContext


def below(parent: SpanContext | None) -> Context:
    """Return the context for a child of *parent*, or for the first span of a trace."""
    return set_span_in_context(NonRecordingSpan(parent)) if parent else Context()


def links(contexts: Iterable[SpanContext | None]) -> list[Link]:
    """Return a link to each known context in *contexts*."""
    return [Link(context) for context in contexts if context is not None]


def span_context(trace: TraceContext | None, *, is_remote: bool) -> SpanContext | None:
    """Return the span context that *trace* names, in another process or in this one."""
    if trace is None:
        return None
    _, trace_id, span_id, flags = trace.traceparent.split("-")
    state = TraceState.from_header([trace.tracestate]) if trace.tracestate else None
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(int(flags, 16)), state)


def trace_of(span: Span) -> TraceContext:
    """Return the trace context that names *span* in a message."""
    context = span.get_span_context()
    traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    state = context.trace_state.to_header()
    return TraceContext(traceparent, state if 0 < len(state) <= TRACESTATE_CHARACTERS_MAX else None)


def nanoseconds(moment: datetime) -> int:
    """Return *moment* in nanoseconds since 1970, the unit of spans."""
    return int(moment.timestamp() * 1e9)
