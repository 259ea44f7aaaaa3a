"""Runs the worker process."""

import gc

import uvloop

from config.otel import span_exporters
from consumer.assembly import build_service
from consumer.commands.output import fail
from consumer.commands.session import exit_after, settings_for
from consumer.errors import one_line
from consumer.tracing.loading import load_spans

# New objects between two collections of the youngest generation: about ten batches.
_COLLECT_AFTER = 20_000


def run_worker() -> None:
    """Run the worker until SIGTERM or SIGINT; end with status 1 if its HTTP port is in use."""
    settings = settings_for()

    async def work() -> None:
        service = build_service(settings, spans=load_spans(span_exporters(), amqp_url=settings.amqp_url_now()))
        # Existing objects stay for good, and a batch is thousands of objects without a cycle. Python's default of 700
        # would scan them three times per batch of 100: 8% of a transaction's CPU.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        await service.run(on_signal=lambda: exit_after(settings.shutdown_grace_seconds))

    try:
        uvloop.run(work())
    except* OSError as group:
        fail(one_line(group.exceptions[0]))
