"""Spans, where OpenTelemetry is installed and told where to send them; nothing at all where it is not.

A message's ``traceparent`` reaches the run's events either way (``traceparent.py``). With spans it is replaced on the
way: the events then name the span in which their run was closed out, in the runner's own trace.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import structlog

from consumer.closeout.inbox import Arrival
from consumer.contract.events import OutboxEvent
from consumer.delivery.intake import Delivery
from consumer.delivery.settlement import Outcome
from consumer.phases import TransactionPhase

log = structlog.get_logger(__name__)

Decode = Callable[[Delivery], Arrival]
CloseOut = Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome]]]
# Told each phase as it is entered.
OnPhase = Callable[[TransactionPhase], None]
# Told why events were left behind.
OnFailure = Callable[[str], None]


class Tracing(Protocol):
    """What is told of a run's way; it never raises and never waits."""

    def decoding(self, decode: Decode) -> Decode:
        """Return *decode*, which also tells of each message that it refuses."""

    def closing_out(self, close_out: CloseOut) -> CloseOut:
        """Return *close_out*, which also tells of each batch and each run, and lets events name their run's span."""

    def attempt(self, arrivals: Sequence[Arrival], *, mode: str) -> AbstractContextManager[OnPhase | None]:
        """Tell of one transaction over *arrivals*, and of what leaves it as an exception."""

    def sending(self, events: Sequence[OutboxEvent]) -> AbstractContextManager[OnFailure | None]:
        """Tell of one write of *events* and the wait for their confirms."""

    async def close(self) -> None:
        """Send what is not yet sent, for a moment only."""


class NoTracing:
    """Tells nobody, and costs nothing."""

    def decoding(self, decode: Decode) -> Decode:
        """Return *decode* itself."""
        return decode

    def closing_out(self, close_out: CloseOut) -> CloseOut:
        """Return *close_out* itself."""
        return close_out

    def attempt(self, arrivals: Sequence[Arrival], *, mode: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Tell nobody."""
        return nullcontext()

    def sending(self, events: Sequence[OutboxEvent]) -> AbstractContextManager[None]:  # noqa: ARG002
        """Tell nobody."""
        return nullcontext()

    async def close(self) -> None:
        """Have nothing to send."""


def load_tracing(exporters: Sequence[str], *, amqp_url: str) -> Tracing:
    """Return what makes spans and sends them to *exporters*; without any, or without OpenTelemetry, what does nothing.

    Nothing of OpenTelemetry is imported unless it is needed.
    """
    if not exporters:
        return NoTracing()
    try:
        from consumer.tracing.export import exported_spans  # noqa: PLC0415 - an extra that need not be installed
    except ImportError as error:
        log.warning(
            "OTEL_* variables ask for spans and OpenTelemetry is not installed: install "
            "deploy/requirements-otel.txt; traceparent is passed on all the same",
            error=str(error),
        )
        return NoTracing()
    return exported_spans(exporters, amqp_url=amqp_url)
