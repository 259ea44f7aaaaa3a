"""The worker: receive, close out, settle; drain on a signal, pause in an outage, resume after it.

One supervisor owns the consumer's connection. After any failure it discards connection, channel and consumer, waits
until both servers are available, and builds new ones.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel as AmqpChannel

from consumer.amqp.acks import Acks
from consumer.amqp.connection import BROKER_ERRORS, BrokerConnection
from consumer.closeout.inbox import Arrival
from consumer.closeout.outcome import Failed, Outcome
from consumer.closeout.yielding import CooperativeYield
from consumer.contract.names import RUN_COMPLETED_QUEUE
from consumer.contract.refusals import MessageRefusedError
from consumer.delivery.intake import Delivery, Intake
from consumer.delivery.settler import Settler
from consumer.delivery.watch import Probes, watch_servers
from consumer.errors import UnavailableError, one_line
from consumer.health import Health

log = structlog.get_logger(__name__)

# Seconds between two probes of an unavailable server: short enough to resume within 5 s of its return.
PROBE_PAUSE_SECONDS = 1.0
# Seconds that batches in progress may take to finish in an outage before their channel is closed.
_PAUSE_GRACE_SECONDS = 10.0
# Seconds of the grace period reserved for closing connections.
_CLOSING_SECONDS = 2.0

CloseOut = Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome]]]


class Worker:
    """Consumes run-completed messages until :meth:`stop` is called; survives outages of both servers."""

    def __init__(
        self,
        *,
        connection: BrokerConnection,
        decode: Callable[[Delivery], Arrival],
        close_out: CloseOut,
        settler: Settler,
        probe: Callable[[], Awaitable[None]],
        ping: Callable[[], Awaitable[None]],
        intake: Intake,
        health: Health,
        prefetch_count: int,
        batch_max_runs: int,
        max_concurrent_transactions: int,
        grace_seconds: float,
        leaving: asyncio.Event,
    ) -> None:
        self._connection = connection
        self._decode = decode
        self._close_out = close_out
        self._settler = settler
        self._probe = probe
        self._ping = ping
        self._intake = intake
        self._health = health
        self._prefetch_count = prefetch_count
        self._batch_max_runs = batch_max_runs
        self._concurrency = max_concurrent_transactions
        self._grace_seconds = grace_seconds
        self.stopping = asyncio.Event()
        # Set while the worker stops, or abandons a channel because of an outage.
        self._leaving = leaving
        self._why = ""

    def stop(self) -> None:
        """Stop consuming; :meth:`run` finishes the taken deliveries within the grace period and returns."""
        self.stopping.set()
        self._leaving.set()

    async def run(self) -> None:
        """Work until :meth:`stop`. Only a bug ends it earlier, with its exception."""
        async with asyncio.TaskGroup() as group:
            transactions = [group.create_task(self._transact()) for _ in range(self._concurrency)]
            await self._supervise()
            self._intake.close()
            # Normally they are done by now. After the grace period they are cancelled, which rolls back.
            _, late = await asyncio.wait(transactions, timeout=_CLOSING_SECONDS / 2)
            for task in late:
                task.cancel()
        self._settler.report()

    async def _supervise(self) -> None:
        while not self.stopping.is_set():
            try:
                await self._probe()
                await self._settler.ready()
                await self._consume()
            except UnavailableError as error:
                self._pause(one_line(error))
            if not self.stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), PROBE_PAUSE_SECONDS)

    async def _consume(self) -> None:
        """Consume until a failure or :meth:`stop`; leave no delivery unsettled on an open channel."""
        if self.stopping.is_set():
            return
        self._leaving.clear()
        channel = await self._connection.channel(confirms=False)
        acks = Acks(channel, hold_back=self._prefetch_count // 2)
        try:
            tag = await self._start(channel, acks)
            self._health.consuming()
            log.info("consuming", queue=RUN_COMPLETED_QUEUE, prefetch=self._prefetch_count)
            probes = self._probes(await self._connection.channel(confirms=False))
            if why := await watch_servers(self._leaving, probes, progress=lambda: self._intake.progress):
                self._break(why)
            if not self.stopping.is_set():
                self._pause(self._why)  # before the batches in progress end: they may block for seconds
            await self._drain(channel, tag, acks)
        finally:
            self._intake.give_back()
            await self._connection.close()
        if not self.stopping.is_set():
            raise UnavailableError(self._why)

    def _probes(self, channel: AmqpChannel) -> Probes:
        # A separate channel: it can be lost in the middle of a request. Without a consumer, the count has no effect.
        return {"PostgreSQL": self._ping, "RabbitMQ": partial(channel.basic_qos, prefetch_count=1)}

    async def _start(self, channel: AmqpChannel, acks: Acks) -> str:
        async def on_delivery(message: DeliveredMessage) -> None:
            self._intake.put(message, acks)

        channel.closing.add_done_callback(self._on_closed)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)
        try:
            await channel.basic_qos(prefetch_count=self._prefetch_count, timeout=_PAUSE_GRACE_SECONDS)
            consumed = await channel.basic_consume(RUN_COMPLETED_QUEUE, on_delivery, timeout=_PAUSE_GRACE_SECONDS)
        except BROKER_ERRORS as error:
            raise UnavailableError(
                f"cannot consume {RUN_COMPLETED_QUEUE}: {one_line(error)} "
                "(run closeout topology if the queue does not exist)"
            ) from error
        return consumed.consumer_tag or ""

    async def _drain(self, channel: AmqpChannel, tag: str, acks: Acks) -> None:
        """Cancel the consumer, let taken deliveries finish, and requeue the rest."""
        grace = _PAUSE_GRACE_SECONDS
        if self.stopping.is_set():
            grace = max(0.0, self._grace_seconds - _CLOSING_SECONDS)
            log.info("draining", grace_seconds=self._grace_seconds)
        else:
            # In an outage, deliveries that were not started are better off in the queue.
            self._settler.requeue(self._intake.give_back())
        with contextlib.suppress(*BROKER_ERRORS):  # a lost channel has no consumer to cancel
            await channel.basic_cancel(tag, timeout=_CLOSING_SECONDS / 2)
        try:
            await asyncio.wait_for(self._intake.idle(), grace)
        except TimeoutError:
            log.warning("not drained in time; remaining deliveries are requeued", seconds=grace)
            await acks.flush(everything=True)
        with contextlib.suppress(*BROKER_ERRORS):
            # The close frame follows the last acks; closing the connection at once could lose them.
            await asyncio.wait_for(channel.close(), _CLOSING_SECONDS / 2)

    async def _transact(self) -> None:
        # One call per batch: a local variable here would keep the last batch and its channel alive while idle.
        while await self._next_batch():
            pass

    async def _next_batch(self) -> bool:
        batch = await self._intake.take(self._batch_max_runs)
        if not batch:
            return False
        try:
            await self._process(batch)
        finally:
            self._intake.settled(batch)
        return True

    async def _process(self, batch: Sequence[Delivery]) -> None:
        arrivals: dict[int, Arrival] = {}
        outcomes: dict[int, Outcome] = {}
        yielding = CooperativeYield()
        for position, delivery in enumerate(batch):
            await yielding.yield_if_due()  # a hostile message can take a third of a second
            try:
                arrivals[position] = self._decode(delivery)
            except MessageRefusedError as error:
                outcomes[position] = Failed(error)
            except Exception as error:  # a bug in decoding one message must not stop the others
                log.exception("cannot decode a delivery", message_id=delivery.message.header.properties.message_id)
                outcomes[position] = Failed(error)
        closed_out = await self._close_out(list(arrivals.values())) if arrivals else ()
        outcomes.update(zip(arrivals, closed_out, strict=True))
        settled = [(delivery, outcomes[position]) for position, delivery in enumerate(batch)]
        pause_reason = await self._settler.settle_all(settled)
        if pause_reason:
            self._break(pause_reason)

    def _on_closed(self, closing: "asyncio.Future[object]") -> None:
        error = None if closing.cancelled() else closing.exception()
        self._break(f"RabbitMQ closed the channel: {one_line(error) if error else 'no reason given'}")

    def _on_cancelled(self, _frame: object) -> None:
        # The queue was deleted or lost its leader: the broker sends nothing more to this consumer.
        self._break(f"RabbitMQ cancelled the consumer of {RUN_COMPLETED_QUEUE}; the queue may have been deleted")

    def _break(self, why: str) -> None:
        if not self._leaving.is_set():
            self._why = why
            self._leaving.set()

    def _pause(self, why: str) -> None:
        if self._health.reason != why:
            log.warning("paused", reason=why)
        self._health.paused(why)
