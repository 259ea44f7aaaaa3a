"""The last minutes of this worker: its counters, sampled every two seconds.

Nothing is added to a message's way. A sample takes a few hundred microseconds and uses no server.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from prometheus_client import Counter, Histogram
from prometheus_client.samples import Sample

from consumer.metrics import Metrics

SAMPLE_SECONDS = 2.0
# Seconds per column of the charts. They show ten minutes; five or two for a younger worker.
SLOT_SECONDS = 6.0
_SPANS = (20, 50, 100)  # columns
SLOTS = _SPANS[-1]
# Seconds that count as "now".
NOW_SECONDS = 10.0


class Counts(NamedTuple):
    """The worker's counters at one time; all of them only rise."""

    at: float  # seconds since the epoch
    committed: float = 0.0
    duplicates: float = 0.0
    parked: float = 0.0
    retried: float = 0.0
    requeued: float = 0.0
    rolled_back: float = 0.0
    events: float = 0.0
    unroutable: float = 0.0
    fallbacks: float = 0.0
    batches: float = 0.0
    # Runs with a lag of at most so many seconds: a cumulative histogram.
    lags: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """The difference of two samples; lags are in seconds, with the resolution of the histogram."""

    start: float
    seconds: float
    committed: float
    events: float
    trouble: float  # rollbacks and parked messages
    lag_median: float | None
    lag_most: float | None

    @property
    def per_second(self) -> float:
        """Runs committed per second."""
        return self.committed / self.seconds if self.seconds else 0.0


class History:
    """The last ten minutes of one worker's counters."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[Counts] = deque(maxlen=int(SLOTS * SLOT_SECONDS / SAMPLE_SECONDS) + 4)

    def sample(self, now: float) -> None:
        """Take a sample."""
        self._samples.append(read_counts(self._metrics, now))

    def samples(self) -> list[Counts]:
        """Return the samples, oldest first."""
        return list(self._samples)


def read_counts(metrics: Metrics, now: float) -> Counts:
    """Return the values of *metrics* at *now*."""
    settled = _by_label(metrics.deliveries, "result")
    return Counts(
        at=now,
        committed=_by_label(metrics.transactions, "result").get("committed", 0.0),
        duplicates=settled.get("duplicate", 0.0),
        parked=settled.get("parked", 0.0),
        retried=settled.get("retried", 0.0),
        requeued=settled.get("requeued", 0.0),
        rolled_back=sum(_by_label(metrics.rollbacks, "phase").values()),
        events=sum(_by_label(metrics.events_published, "type").values()),
        unroutable=sum(_by_label(metrics.events_unroutable, "type").values()),
        fallbacks=sum(sample.value for sample in _totals(metrics.legacy_fallbacks)),
        batches=sum(s.value for f in metrics.batch_runs.collect() for s in f.samples if s.name.endswith("_count")),
        lags=tuple(_buckets(metrics.completion_lag)),
    )


def parked_by_reason(metrics: Metrics) -> dict[str, int]:
    """Return how many messages this worker has parked since it started, most frequent reason first."""
    found = _by_label(metrics.parked, "reason")
    return {reason: int(number) for reason, number in sorted(found.items(), key=lambda item: -item[1]) if number}


def slots(samples: Sequence[Counts], now: float) -> list[Slot]:
    """Return the columns of the charts up to *now*, oldest first; none for a time without two samples.

    Columns start at multiples of their width, so that they do not shift between two pages; the last one is partial.
    """
    oldest = now // SLOT_SECONDS - SLOTS + 1
    edges: dict[float, Counts] = {}  # by column, its last sample; also for the one before the oldest
    marks: list[Counts] = []
    for sample in samples:
        column = sample.at // SLOT_SECONDS
        if column >= oldest - 1:
            marks = marks or [sample]
            edges[column] = sample
    marks += edges.values()
    found = [between(a, b, start=b.at // SLOT_SECONDS * SLOT_SECONDS) for a, b in pairwise(marks) if b.at > a.at]
    return [slot for slot in found if slot.start // SLOT_SECONDS >= oldest]


def columns_since(start: float | None, now: float) -> int:
    """Return the number of columns for a worker that started at *start*."""
    age = 0.0 if start is None else (now - start) / SLOT_SECONDS
    return next((columns for columns in _SPANS if age < columns - 1), SLOTS)


def lately(samples: Sequence[Counts], now: float) -> Slot | None:
    """Return the last ten seconds, or the time since the start; ``None`` without two samples."""
    recent = [sample for sample in samples if sample.at >= now - NOW_SECONDS - SAMPLE_SECONDS]
    return between(recent[0], recent[-1], start=recent[0].at) if len(recent) > 1 else None


def between(a: Counts, b: Counts, *, start: float) -> Slot:
    """Return the difference from *a* to *b*."""
    before = dict(a.lags)
    lags = [(bound, number - before.get(bound, 0.0)) for bound, number in b.lags]
    return Slot(
        start=start,
        seconds=b.at - a.at,
        committed=b.committed - a.committed,
        events=b.events - a.events,
        trouble=(b.rolled_back - a.rolled_back) + (b.parked - a.parked),
        lag_median=quantile(lags, 0.5),
        lag_most=quantile(lags, 0.95),
    )


def quantile(cumulative: Sequence[tuple[float, float]], share: float) -> float | None:
    """Return the value below which *share* of a cumulative histogram lies, as Prometheus' ``histogram_quantile`` does.

    Within a step it is interpolated; beyond the last finite bound, that bound is returned. ``None``: it is empty.
    """
    total = cumulative[-1][1] if cumulative else 0.0
    if total <= 0:
        return None
    low, below = 0.0, 0.0
    for bound, number in cumulative:
        if number >= share * total:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (share * total - below) / (number - below) if number > below else bound
        low, below = bound, number
    return low


def _by_label(counter: Counter, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for sample in _totals(counter):
        found[sample.labels[label]] = found.get(sample.labels[label], 0.0) + sample.value
    return found


def _totals(counter: Counter) -> Iterator[Sample]:
    return (s for family in counter.collect() for s in family.samples if s.name.endswith("_total"))


def _buckets(histogram: Histogram) -> Iterable[tuple[float, float]]:
    for family in histogram.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                yield float(sample.labels["le"]), sample.value
