"""The model: what a run costs, who has to do the work, and what waits.

- Runs arrive around the day's mean: at the peak hour *peak* times the mean, at night correspondingly fewer.
- Each run belongs to a tenant. Tenants differ in size (Zipf with exponent *skew*), and a tenant is on one shard, by a
  hash. The shards are distributed evenly over the nodes by number, as Citus does it, so the load is not even.
- A run costs CPU of a worker, of RabbitMQ, of the node that its session is connected to (planning) and of the node that
  has its tenant (execution). Sessions are spread over all nodes. The costs are those that ``scripts/bench citus`` and
  ``scripts/bench`` measured.
- A node spends at most *cores* x 60 s of CPU per minute. Runs for which it has no time wait.
- One node is down for *outage* minutes from the peak minute on. All runs are taken to wait, the worst case: a worker
  pauses when a node that a batch needs is down.

It does not model network, memory, checkpoints, vacuum or locks: a node is taken to keep its indexes in memory.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MINUTES = 24 * 60
PEAK_MINUTE = 14 * 60
SHARDS_PER_NODE = 32


class Cost(NamedTuple):
    """CPU milliseconds of one run, and bytes."""

    worker: float
    broker: float
    session: float  # on the node that the worker is connected to
    shard: float  # on the node that has the tenant's rows
    wal: int
    stored: int


# Medians of one run of scripts/bench citus, on two cores that all processes share.
ON_CITUS = Cost(worker=0.53, broker=0.26, session=0.30, shard=0.75, wal=5_750, stored=1_900)
ON_ONE_SERVER = Cost(worker=0.33, broker=0.24, session=0.0, shard=0.15, wal=5_500, stored=1_900)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is simulated."""

    runs_per_day: int
    nodes: int
    cores: int = 16  # of each node
    tenants: int = 5_000
    skew: float = 0.9
    peak: float = 3.0
    outage: int = 10

    @property
    def cost(self) -> Cost:
        """What a run costs on this number of nodes."""
        return ON_CITUS if self.nodes > 1 else ON_ONE_SERVER


class Day(NamedTuple):
    """What a day shows."""

    peak_rate: float  # runs per second, the busiest minute
    busiest: float  # share of the fullest node's cores at the peak
    mean: float  # share of all nodes' cores at the peak
    workers: float  # cores of workers at the peak
    broker: float  # cores of RabbitMQ at the peak
    longest_wait: int  # minutes that the fullest node's last run in the queue waits, at most
    waited: int  # minutes from the start of the outage until no run waited any more
    wal_mb: float  # per second and node at the peak
    stored_gb: float  # per node and day


def arrivals(cluster: Cluster) -> Iterator[float]:
    """Yield the runs of each minute of the day."""
    mean = cluster.runs_per_day / MINUTES
    # A bell around the peak hour whose top is peak times its mean.
    steep = _steepness(cluster.peak)
    shape = [math.exp(steep * math.cos(2 * math.pi * (m - PEAK_MINUTE) / MINUTES)) for m in range(MINUTES)]
    total = sum(shape)
    yield from (mean * MINUTES * share / total for share in shape)


def _steepness(peak: float) -> float:
    """Return k for which the maximum of exp(k cos x) is *peak* times its mean, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        k = (low + high) / 2
        mean = sum(math.exp(k * (math.cos(2 * math.pi * n / 360) - 1)) for n in range(360)) / 360
        low, high = (k, high) if 1 / mean < peak else (low, k)
    return low


def shares(cluster: Cluster, seed: int) -> list[float]:
    """Return each node's share of all runs."""
    source = random.Random(seed)  # noqa: S311 - repeatable
    weights = [1 / (rank + 1) ** cluster.skew for rank in range(cluster.tenants)]
    total, found = sum(weights), [0.0] * cluster.nodes
    shards = SHARDS_PER_NODE * cluster.nodes
    for weight in weights:
        found[source.randrange(shards) % cluster.nodes] += weight / total
    return found


def simulate(cluster: Cluster, seed: int = 1) -> Day:
    """Return a day of *cluster*; the same *seed* gives the same day."""
    cost, of_node = cluster.cost, shares(cluster, seed)
    capacity = cluster.cores * 60_000.0  # CPU ms per minute
    fullest = max(range(cluster.nodes), key=of_node.__getitem__)
    waiting = [0.0] * cluster.nodes
    peak_rate, longest, empty_at = 0.0, 0, PEAK_MINUTE
    down = range(PEAK_MINUTE, PEAK_MINUTE + cluster.outage)
    for minute, runs in enumerate(arrivals(cluster)):
        peak_rate = max(peak_rate, runs / 60)
        for node, share in enumerate(of_node):
            waiting[node] += runs * share
            if minute not in down:
                left = capacity - cost.session * runs / cluster.nodes
                waiting[node] -= min(waiting[node], max(0.0, left) / cost.shard)
        if minute >= PEAK_MINUTE and waiting[fullest] >= 1:
            longest = max(longest, math.ceil(waiting[fullest] / max(1.0, runs * of_node[fullest])))
            empty_at = minute
    per_ms = peak_rate / 1000  # runs per second to cores, for a cost in ms
    return Day(
        peak_rate,
        per_ms * (cost.session / cluster.nodes + cost.shard * of_node[fullest]) / cluster.cores,
        per_ms * (cost.session + cost.shard) / cluster.nodes / cluster.cores,
        per_ms * cost.worker,
        per_ms * cost.broker,
        longest,
        empty_at + 1 - PEAK_MINUTE,
        peak_rate * cost.wal / 1e6 * of_node[fullest],
        cluster.runs_per_day * cost.stored / 1e9 * of_node[fullest],
    )
