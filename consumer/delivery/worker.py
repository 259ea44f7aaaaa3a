"""The worker: receive, close out, settle; drain on a signal, pause in an outage, resume after it.

One supervisor owns the consumers. After a failure of all of them it discards connections, channels and consumers, waits
until both servers are available, and builds new ones.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import structlog

from consumer.closeout.inbox import Arrival
from consumer.closeout.outcome import Failed, Outcome
from consumer.closeout.yielding import CooperativeYield
from consumer.contract.refusals import MessageRefusedError
from consumer.delivery.consumers import Consumers
from consumer.delivery.intake import Delivery, Intake
from consumer.delivery.settler import Settler
from consumer.delivery.watch import watch_servers
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
        consumers: Consumers,
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
        self._consumers = consumers
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
        try:
            await self._consumers.start(self._break)
            self._health.consuming()
            log.info("consuming", queue=", ".join(self._consumers.queues), prefetch=self._prefetch_count)
            probes = {"PostgreSQL": self._ping, **await self._consumers.probes()}
            if why := await watch_servers(self._leaving, probes, progress=lambda: self._intake.progress):
                self._break(why)
            if not self.stopping.is_set():
                self._pause(self._why)  # before the batches in progress end: they may block for seconds
            await self._drain()
        finally:
            self._intake.give_back()
            await self._consumers.close()
        if not self.stopping.is_set():
            raise UnavailableError(self._why)

    async def _drain(self) -> None:
        """Cancel the consumers, let taken deliveries finish, and requeue the rest."""
        grace = _PAUSE_GRACE_SECONDS
        if self.stopping.is_set():
            grace = max(0.0, self._grace_seconds - _CLOSING_SECONDS)
            log.info("draining", grace_seconds=self._grace_seconds)
        else:
            # In an outage, deliveries that were not started are better off in the queue.
            self._settler.requeue(self._intake.give_back())
        await self._consumers.cancel(within=_CLOSING_SECONDS / 2)
        try:
            await asyncio.wait_for(self._intake.idle(), grace)
        except TimeoutError:
            log.warning("not drained in time; remaining deliveries are requeued", seconds=grace)
            await self._consumers.flush()
        await self._consumers.close_channels(within=_CLOSING_SECONDS / 2)

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

    def _break(self, why: str) -> None:
        if not self._leaving.is_set():
            self._why = why
            self._leaving.set()

    def _pause(self, why: str) -> None:
        if self._health.reason != why:
            log.warning("paused", reason=why)
        self._health.paused(why)
