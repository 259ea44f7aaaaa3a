"""The data of the overview, and its sources."""

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
from consumer.console.shared_reads import SharedRead, Snapshot
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outbox.backlog import Pending
from consumer.runs.lookup import Row
from consumer.version import installed_version


@dataclass(frozen=True, slots=True)
class RollbackReason:
    """Attempts rolled back at the same phase for the same reason."""

    phase: str
    error_type: str
    error: str
    rows: list[Row] = field(default_factory=list)


def by_reason(rows: Sequence[Row]) -> list[RollbackReason]:
    """Group *rows* by reason, in order of appearance."""
    reasons: dict[tuple[str, str, str], RollbackReason] = {}
    for row in rows:
        key = (row["phase_reached"], row["error_type"], row["error"])
        reasons.setdefault(key, RollbackReason(*key)).rows.append(row)
    return list(reasons.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All data of the overview, read at one time."""

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
    depths: Snapshot[Depths]
    waiting: Snapshot[Pending]
    pace: Snapshot[Pace]
    rollbacks: Snapshot[Sequence[Row]]
    runs: Snapshot[Sequence[Row]]

    @property
    def rollback_reasons(self) -> list[RollbackReason]:
        """The last rollbacks by reason."""
        return by_reason(self.rollbacks.value or ())

    @property
    def faults(self) -> dict[str, bool]:
        """Distinct reasons why data could not be read, each with whether the server is only slow."""
        readings: tuple[Snapshot[Any], ...] = (self.depths, self.waiting, self.pace, self.rollbacks, self.runs)
        return {reading.fault: reading.is_slow for reading in readings if reading.fault}


class Overview:
    """Reads the overview: this worker's counters, and the two servers if they respond in time."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        broker: BrokerConnection,
        metrics: Metrics,
        health: Health,
        parked: ParkedLately,
        intake_queues: int = 1,
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._parked = parked
        self.history = History(metrics)
        self._queues = QueueDepths(broker, intake_queues)
        self._depths: SharedRead[Depths] = SharedRead("RabbitMQ", self._queues.read)
        # Separate reads: a slow one on a large table becomes less frequent without slowing the others.
        self._waiting: SharedRead[Pending] = SharedRead("PostgreSQL", partial(database.pending_events, engine))
        self._pace: SharedRead[Pace] = SharedRead("PostgreSQL", partial(database.pace, engine))
        self._rollbacks: SharedRead[Sequence[Row]] = SharedRead(
            "PostgreSQL", partial(database.latest_rollbacks, engine)
        )
        self._runs: SharedRead[Sequence[Row]] = SharedRead("PostgreSQL", partial(database.latest_runs, engine))
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    async def read(self) -> Picture:
        """Return the overview within a second, even if a server does not respond."""
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
        """Close the broker's connection; reads in progress get *within* seconds to end."""
        readings: tuple[SharedRead[Any], ...] = (self._depths, self._waiting, self._pace, self._rollbacks, self._runs)
        await asyncio.gather(*(reading.settle(within) for reading in readings))
        await self._queues.close()


def _value(gauge: Gauge) -> float:
    return next(sample.value for family in gauge.collect() for sample in family.samples)
