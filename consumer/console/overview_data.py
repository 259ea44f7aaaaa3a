"""The flow as one picture: what the overview shows, and where it comes from."""

import asyncio
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.amqp.connection import BrokerConnection
from consumer.console import queries as database
from consumer.console.charts import LagChart, RateChart, lag_chart, rate_chart
from consumer.console.history import SLOT_SECONDS, Counts, History, Slot, columns_since, lately, parked_by_reason, slots
from consumer.console.queries import Pace
from consumer.console.queue_depths import Depths, QueueDepths
from consumer.console.recently_parked import ParkedLately, ParkedMessage
from consumer.console.shared_reads import Reading, Shared
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outbox.backlog import Pending
from consumer.runs.lookup import Row
from consumer.version import installed_version


@dataclass(frozen=True, slots=True)
class RollbackReason:
    """Attempts that were rolled back at the same phase for the same reason."""

    phase: str
    error_type: str
    error: str
    rows: list[Row] = field(default_factory=list)


def by_reason(rows: Sequence[Row]) -> list[RollbackReason]:
    """Return *rows* by what was the matter, in the order in which each reason appears."""
    reasons: dict[tuple[str, str, str], RollbackReason] = {}
    for row in rows:
        key = (row["phase_reached"], row["error_type"], row["error"])
        reasons.setdefault(key, RollbackReason(*key)).rows.append(row)
    return list(reasons.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that the overview shows, read at one moment."""

    now: datetime
    worker: str
    version: str
    reason: str | None
    since: datetime
    is_atomic: bool
    inflight: int
    counts: Counts
    lately: Slot | None
    minutes: int
    rates: RateChart
    lags: LagChart
    reasons: Mapping[str, int]
    parked_lately: Sequence[ParkedMessage]
    depths: Reading[Depths]
    waiting: Reading[Pending]
    pace: Reading[Pace]
    rollbacks: Reading[Sequence[Row]]
    runs: Reading[Sequence[Row]]

    @property
    def rollback_reasons(self) -> list[RollbackReason]:
        """The last rollbacks by their reason."""
        return by_reason(self.rollbacks.value or ())

    @property
    def faults(self) -> dict[str, bool]:
        """Why something could not be read, each reason once, and whether it is only slow."""
        readings: tuple[Reading[Any], ...] = (self.depths, self.waiting, self.pace, self.rollbacks, self.runs)
        return {reading.fault: reading.is_slow for reading in readings if reading.fault}


class Overview:
    """Reads the picture: from this worker's counters always, from the two servers when they answer in time."""

    def __init__(
        self, *, engine: AsyncEngine, broker: BrokerConnection, metrics: Metrics, health: Health, parked: ParkedLately
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._parked = parked
        self.history = History(metrics)
        self._queues = QueueDepths(broker)
        self._depths: Shared[Depths] = Shared("RabbitMQ", self._queues.read)
        # Each by itself: one that takes long on a large table is made less often, and the others are not.
        self._waiting: Shared[Pending] = Shared("PostgreSQL", partial(database.pending_events, engine))
        self._pace: Shared[Pace] = Shared("PostgreSQL", partial(database.pace, engine))
        self._rollbacks: Shared[Sequence[Row]] = Shared("PostgreSQL", partial(database.latest_rollbacks, engine))
        self._runs: Shared[Sequence[Row]] = Shared("PostgreSQL", partial(database.latest_runs, engine))
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    async def read(self) -> Picture:
        """Return the picture within a second, whatever the servers do."""
        depths, waiting, pace, rollbacks, runs = await asyncio.gather(
            self._depths.latest(), self._waiting.latest(), self._pace.latest(), self._rollbacks.latest(),
            self._runs.latest(),
        )  # fmt: skip
        clock = time.time()
        samples = self.history.samples()
        columns = columns_since(samples[0].at if samples else None, clock)
        drawn = slots(samples, clock)
        return Picture(
            now=datetime.fromtimestamp(clock, UTC),
            worker=self._name,
            version=installed_version(),
            reason=self._health.reason,
            since=self._health.since,
            is_atomic=bool(_value(self._metrics.coordinator_enabled)),
            inflight=int(_value(self._metrics.inflight)),
            counts=samples[-1] if samples else Counts(clock),
            lately=lately(samples, clock),
            minutes=int(columns * SLOT_SECONDS / 60),
            rates=rate_chart(drawn, clock, columns=columns),
            lags=lag_chart(drawn, clock, columns=columns),
            reasons=parked_by_reason(self._metrics),
            parked_lately=self._parked.newest(),
            depths=depths,
            waiting=waiting,
            pace=pace,
            rollbacks=rollbacks,
            runs=runs,
        )

    async def release(self, within: float) -> None:
        """Let go of the broker; readings that are under way get *within* seconds to end."""
        readings: tuple[Shared[Any], ...] = (self._depths, self._waiting, self._pace, self._rollbacks, self._runs)
        await asyncio.gather(*(reading.settle(within) for reading in readings))
        await self._queues.close()


def _value(gauge: Gauge) -> float:
    return next(sample.value for family in gauge.collect() for sample in family.samples)
