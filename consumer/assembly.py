"""Builds the worker from settings, runs it, and stops it on SIGTERM: the only module that knows every part."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import ProcessCollector
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.closeout.attempt import unobserved
from consumer.closeout.dispatcher import Dispatcher, Rollout, count_details
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.console.app import Console
from consumer.console.recently_parked import ParkedLately, RememberingChannel
from consumer.contract.metadata import clean_text
from consumer.contract.names import consumed_queues
from consumer.contract.run_message import decode
from consumer.contract.trace_context import context_in
from consumer.delivery.consumers import Consumers
from consumer.delivery.intake import Delivery, Intake
from consumer.delivery.parking import Parking
from consumer.delivery.queue_consumer import QueueConsumer
from consumer.delivery.settler import Settler
from consumer.delivery.worker import Worker
from consumer.health import Health
from consumer.http_server import HttpService, application
from consumer.metrics import Metrics
from consumer.outbox.backlog import watch_pending
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import Relay
from consumer.postgres.engine import SPARE_CONNECTIONS, ServerKind, create_engine
from consumer.postgres.readiness import ping, probe_privileges
from consumer.version import installed_version
from domains.policies.book import PolicyBook
from domains.run import TEXT_MAX

if TYPE_CHECKING:
    from consumer.tracing.spans import Spans

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Service:
    """The worker process: worker, relay, HTTP server, and the connections they use."""

    worker: Worker
    relay: Relay
    http: HttpService
    console: Console
    engine: AsyncEngine
    publishing: BrokerConnection
    watch: Callable[[asyncio.Event], Coroutine[Any, Any, None]]
    spans: "Spans | None"

    async def run(self, *, on_signal: Callable[[], None] | None = None) -> None:
        """Work until SIGTERM or SIGINT, drain, and close everything; a second signal exits immediately.

        *on_signal* is called at the first signal.
        """
        async with AsyncExitStack() as closing:
            if self.spans is not None:
                closing.push_async_callback(self.spans.close)  # runs last, so that spans of the shutdown are sent
            closing.push_async_callback(self.engine.dispose)
            closing.push_async_callback(self.publishing.close)
            closing.push_async_callback(self.console.close)
            self._listen_for_signals(on_signal)
            async with asyncio.TaskGroup() as group:
                group.create_task(self.http.run())
                group.create_task(self.relay.run(self.worker.stopping))
                group.create_task(self.watch(self.worker.stopping))
                group.create_task(self.console.run(self.worker.stopping))
                await self.worker.run()
                self.http.stop()
        log.info("stopped")

    def _listen_for_signals(self, then: Callable[[], None] | None) -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: signal.Signals) -> None:
            if self.worker.stopping.is_set():
                log.warning("second signal: exiting immediately", signal=number.name)
                # The default action, so that the exit status names the signal.
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
                # Still running: the kernel ignores signals without a handler for process 1 of a container.
                os._exit(128 + number)
            log.info("stopping", signal=number.name)
            self.worker.stop()
            if then is not None:
                then()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)


def build_service(settings: Settings, *, spans: "Spans | None" = None) -> Service:
    """Build the worker that *settings* describe. Needs a running event loop; connects to nothing yet."""
    metrics = Metrics()
    # CPU, memory and file descriptors of the process, under their standard names.
    ProcessCollector(registry=metrics.registry)
    metrics.coordinator_enabled.set(settings.transaction_coordinator_enabled)
    health = Health(metrics)
    # Read for each new connection, so that a password in a mounted file can change without a restart.
    database_url, amqp_url = settings.database_url_now, settings.amqp_url_now
    server = ServerKind()
    engine = create_engine(
        database_url,
        pool_size=settings.max_concurrent_transactions + SPARE_CONNECTIONS,
        by_key=True,
        server=server,
    )
    # Separate connections: a broker in alarm blocks publishers, and acks must still flow.
    publishing = BrokerConnection(amqp_url, name="closeout publish")
    publisher = partial(EventPublisher, metrics=metrics, require_subscribers=settings.require_event_subscribers)
    if spans is not None:
        publisher = partial(publisher, observe=spans.sending)
    observe = spans.attempt if spans is not None else unobserved
    policies = PolicyBook()
    leaving = asyncio.Event()
    parked = ParkedLately()
    copies = RememberingChannel(publishing, parked)
    events = publisher(ConfirmedChannel(publishing))
    dispatcher = Dispatcher(
        coordinator=RunCompletionTransaction(
            engine=engine, policies=policies, publisher=events, metrics=metrics, observe=observe
        ),
        legacy=LegacyCloseOut(engine=engine, policies=policies, publisher=events, metrics=metrics, observe=observe),
        rollout=Rollout(
            settings.transaction_coordinator_enabled,
            settings.transaction_coordinator_tenants,
            settings.legacy_fallback_enabled,
        ),
        metrics=metrics,
        give_up=leaving.is_set,
        by_tenant=lambda: server.is_citus,
    )
    decode_one = partial(decode_delivery, settings=settings, publishing=publishing)
    close_out = partial(count_details, close_out=dispatcher.close_out, metrics=metrics)
    intake = Intake(metrics)
    share = prefetch_share(settings)
    settler = Settler(
        channel=copies,
        parking=Parking(channel=copies, metrics=metrics, health=health),
        metrics=metrics,
        max_attempts=settings.delivery_max_attempts,
        held_max=share // 2,
    )
    consumers = Consumers(
        [
            QueueConsumer(queue, BrokerConnection(amqp_url, name="closeout consume"), intake, prefetch=share)
            for queue in consumed_queues(settings.intake_queues)
        ],
        requeued=settler.requeue,
        health=health,
        metrics=metrics,
    )
    worker = Worker(
        consumers=consumers,
        decode=decode_one if spans is None else spans.decoding(decode_one),
        close_out=close_out if spans is None else spans.closing_out(close_out),
        settler=settler,
        probe=partial(probe_privileges, engine),
        ping=partial(ping, engine),
        intake=intake,
        health=health,
        prefetch_count=settings.prefetch_count,
        batch_max_runs=settings.batch_max_runs,
        max_concurrent_transactions=settings.max_concurrent_transactions,
        grace_seconds=settings.shutdown_grace_seconds,
        leaving=leaving,
    )
    # A separate channel for the relay: aiormq tracks returned messages by id, and both may publish the same event.
    relay = Relay(engine=engine, publisher=publisher(ConfirmedChannel(publishing)), metrics=metrics)
    console = Console(
        database_url=database_url,
        amqp_url=amqp_url,
        metrics=metrics,
        health=health,
        parked=parked,
        intake_queues=settings.intake_queues,
    )
    http = HttpService(application(metrics, health, console), host=settings.http_host, port=settings.http_port)
    _announce(settings, http)
    watch = partial(watch_pending, engine=engine, metrics=metrics)
    return Service(worker, relay, http, console, engine, publishing, watch, spans)


def prefetch_share(settings: Settings) -> int:
    """Return each queue's share of ``PREFETCH_COUNT``."""
    return max(1, settings.prefetch_count // len(consumed_queues(settings.intake_queues)))


def decode_delivery(delivery: Delivery, *, settings: Settings, publishing: BrokerConnection) -> Arrival:
    """Return the arrival in *delivery*; raise ``MessageRefusedError`` as ``decode`` does.

    The worker's own user is trusted: it publishes the copies that come back from the retry queue.
    """
    properties = delivery.message.header.properties
    trusted, own_user = settings.trusted_publishers, publishing.user
    decoded = decode(
        delivery.message.body,
        max_bytes=settings.message_max_bytes,
        content_encoding=properties.content_encoding,
        headers=properties.headers,
        user_id=properties.user_id,
        trusted_publishers=trusted | {own_user} if trusted and own_user else trusted,
    )
    message_id = properties.message_id or decoded.event_id
    return Arrival(
        decoded.run,
        decoded.digest,
        delivery.received_at,
        clean_text(message_id)[:TEXT_MAX] if message_id else message_id,
        context_in(properties.headers),
        decoded.adjustments,
    )


def _announce(settings: Settings, http: HttpService) -> None:
    log.info(
        "starting",
        version=installed_version(),
        coordinator=settings.transaction_coordinator_enabled,
        http=f"{settings.http_host}:{http.port}",
        prefetch=settings.prefetch_count,
        batch_max_runs=settings.batch_max_runs,
        transactions=settings.max_concurrent_transactions,
    )
    if not settings.transaction_coordinator_enabled:
        log.warning(
            "TRANSACTION_COORDINATOR_ENABLED IS FALSE: each run is closed out with three separate writes. A crash "
            "between them leaves a run partly closed out until its message is redelivered. Set it to true."
        )
    elif settings.transaction_coordinator_tenants:
        log.warning(
            "the coordinator is enabled for some tenants only; runs of all others are closed out without atomicity",
            tenants=sorted(settings.transaction_coordinator_tenants),
        )
