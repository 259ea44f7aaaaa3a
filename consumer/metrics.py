"""Every metric the worker has, each with what a rise means and what to do about it. Contract section 9.

No tenant, run or agent id is ever a label: their number has no bound, and a scrape's size must have one.
"""

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Seconds. A batch of 50 commits in about 20 ms on two cores; a lock wait ends at 5 s.
_TRANSACTION_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0)
# Seconds from a run's end to its commit: the queue's backlog is in it, so it reaches to an hour.
_LAG_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
_BATCH_BUCKETS = (1, 2, 5, 10, 20, 35, 50, 100, 200)


class Metrics:
    """The worker's metrics in a registry of its own, so that tests and embedders may have several."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._count_work()
        self._measure_time()
        self._show_state()

    def _count_work(self) -> None:
        self.deliveries = Counter(
            "closeout_deliveries_total",
            "Deliveries by how they were settled. 'parked' rising: look at closeout parked list. "
            "'retried' rising: runs fail for reasons of their own, see the log. 'requeued' rising: a server is away.",
            ["result"],
            registry=self.registry,
        )
        self.transactions = Counter(
            "closeout_transactions_total",
            "Close-outs of runs by path and result. 'rolled_back' above normal: see governance.rollbacks.",
            ["mode", "result"],
            registry=self.registry,
        )
        self.phase_entered = Counter(
            "closeout_phase_entered_total",
            "Runs that entered each phase. A gap between two phases that stays: attempts end there.",
            ["phase"],
            registry=self.registry,
        )
        self.rollbacks = Counter(
            "closeout_rollbacks_total",
            "Runs whose attempt was rolled back, by the phase it had reached. Rising: the database, or one run's data.",
            ["phase"],
            registry=self.registry,
        )
        self.legacy_fallbacks = Counter(
            "closeout_legacy_fallbacks_total",
            "Runs closed out by the non-atomic path after their transaction failed. Should be 0: find out why.",
            registry=self.registry,
        )
        self.events_published = Counter(
            "closeout_events_published_total",
            "Events confirmed by the broker.",
            ["type"],
            registry=self.registry,
        )
        self.events_unroutable = Counter(
            "closeout_events_unroutable_total",
            "Events no queue was bound for. Rising though there are subscribers: a binding was lost.",
            ["type"],
            registry=self.registry,
        )
        self.parked = Counter(
            "closeout_parked_total",
            "Messages parked, by reason. Rising: a runner sends what the contract does not allow, or a run cannot be "
            "written (attempts_exhausted).",
            ["reason"],
            registry=self.registry,
        )

        self.policy_shadow = Counter(
            "closeout_policy_shadow_total",
            "What policies in shadow would have done to the runs that were closed out: see closeout policies shadow. "
            "'error' rising: a condition in shadow fails to evaluate; mend it before it is put into force.",
            ["result"],
            registry=self.registry,
        )
        for result in ("flag", "suppress_incident", "error"):
            self.policy_shadow.labels(result)

    def _measure_time(self) -> None:
        self.transaction_duration = Histogram(
            "closeout_transaction_duration_seconds",
            "From claim to commit, a batch. Rising: the database is slow, or waits for locks.",
            ["mode"],
            buckets=_TRANSACTION_BUCKETS,
            registry=self.registry,
        )
        self.publish_duration = Histogram(
            "closeout_publish_duration_seconds",
            "From the first publish of a batch to its last confirm. Rising: the broker's disk, or a lost replica.",
            buckets=_TRANSACTION_BUCKETS,
            registry=self.registry,
        )
        self.completion_lag = Histogram(
            "closeout_completion_lag_seconds",
            "From a run's completion, by the runner's clock, to its commit. Rising: more runs arrive than are closed "
            "out; add workers, or look for an outage.",
            buckets=_LAG_BUCKETS,
            registry=self.registry,
        )
        self.batch_runs = Histogram(
            "closeout_batch_runs",
            "Runs a transaction. At BATCH_MAX_RUNS all the time: the worker is at its limit.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )

    def _show_state(self) -> None:
        self.outbox_pending = Gauge(
            "closeout_outbox_pending",
            "Runs whose events are committed and not yet confirmed (counted up to 10,000). Rising: the broker does not "
            "confirm, or REQUIRE_EVENT_SUBSCRIBERS holds back events nobody subscribes to.",
            registry=self.registry,
        )
        self.outbox_oldest = Gauge(
            "closeout_outbox_oldest_seconds",
            "Age of the oldest event in the outbox. Above a minute: the relay is stuck.",
            registry=self.registry,
        )
        self.inflight = Gauge(
            "closeout_inflight_deliveries",
            "Deliveries taken and not yet settled. At PREFETCH_COUNT all the time: the worker is at its limit.",
            registry=self.registry,
        )
        self.paused = Gauge(
            "closeout_consumer_paused",
            "1 while the worker does not consume because a server is away; /readyz says which.",
            registry=self.registry,
        )
        self.coordinator_enabled = Gauge(
            "closeout_coordinator_enabled",
            "1 if TRANSACTION_COORDINATOR_ENABLED. 0: runs are closed out without atomicity.",
            registry=self.registry,
        )
        build = Gauge("closeout_build_info", "Which version runs.", ["version"], registry=self.registry)
        build.labels(installed_version()).set(1)


def installed_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("closeout")
    except PackageNotFoundError:
        return "unknown"
