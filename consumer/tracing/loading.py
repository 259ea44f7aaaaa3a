"""Spans, if OTEL_* variables request them and the optional dependency group ``otel`` is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from consumer.tracing.spans import Spans

log = structlog.get_logger(__name__)


def load_spans(exporters: Sequence[str], *, amqp_url: str) -> Spans | None:
    """Return the maker of spans that are sent to *exporters*; ``None`` without exporters or without OpenTelemetry.

    Imports OpenTelemetry only if it is needed. ``traceparent`` is passed on from message to event in any case.
    """
    if not exporters:
        return None
    try:
        from consumer.tracing.export import exported_spans  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        log.warning(
            "OTEL_* variables request spans, but OpenTelemetry is not installed: install "
            "deploy/requirements-otel.txt; traceparent is still passed on",
            error=str(error),
        )
        return None
    return exported_spans(exporters, amqp_url=amqp_url)
