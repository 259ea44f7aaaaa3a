"""Exports spans through the SDK's provider, configured by the standard OTEL_* variables. Imports OpenTelemetry.

The SDK and the exporters read sampling, limits, queue size, endpoint, headers and timeouts themselves. Spans wait in a
bounded queue for a thread of the SDK: an unavailable collector costs spans, not runs.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from threading import Thread

import structlog
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from consumer.tracing.spans import Spans
from consumer.version import installed_version

log = structlog.get_logger(__name__)

# Seconds to send the remaining spans at shutdown. A collector takes milliseconds; an unavailable one must not use up
# the grace period.
FLUSH_SECONDS = 1.0


def exported_spans(exporters: Sequence[str], *, amqp_url: str) -> Spans | None:
    """Return the maker of spans that *exporters*, entry point names, send; ``None`` if none loads. Never raises."""
    made = [exporter for name in exporters if (exporter := _exporter(name)) is not None]
    if not made:
        return None
    # OpenTelemetry knows only the keys of W3C's first edition and warns of each tracestate with others: any runner
    # could fill the log.
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    for exporter in made:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    log.info("exporting spans", exporters=list(exporters))
    return Spans(provider, amqp_url=amqp_url, close=lambda: _within(FLUSH_SECONDS, provider.shutdown))


def _exporter(name: str) -> SpanExporter | None:
    installed = entry_points(group="opentelemetry_traces_exporter")
    try:
        if name not in installed.names:
            raise LookupError("not installed")  # noqa: TRY301 - one place logs the reason
        made: SpanExporter = installed[name].load()()
    except Exception as error:  # noqa: BLE001 - an exporter must not stop the worker
        names = ", ".join(sorted(installed.names))
        log.warning(
            "span exporter not available", exporter=name, installed=names, error=f"{type(error).__name__}: {error}"
        )
        return None
    return made


def _resource() -> Resource:
    # Attributes passed here override the variables, so the variables are read first.
    named = {"service.name": "closeout", "service.version": installed_version()}
    return Resource.create({**named, **OTELResourceDetector().detect().attributes})


async def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run *work* in a thread for at most *seconds*; an executor would wait for it when the loop ends."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            loop.call_soon_threadsafe(done.set)

    Thread(target=run, name="spans", daemon=True).start()
    try:
        await asyncio.wait_for(done.wait(), seconds)
    except TimeoutError:
        log.warning("spans not exported in time", seconds=seconds)
