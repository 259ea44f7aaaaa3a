"""All metrics of the worker, each with the meaning of a rise and what to do.

No tenant, run or agent id is a label: their number is unbounded, and the size of a scrape must be bounded. Every label
value exists from the start, at 0: a counter that appeared with its first event would start at 1, and Prometheus, which
computes differences, would never see that event.
"""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from consumer.contract.events import EventType
from consumer.contract.names import ADJUSTABLE_FIELDS
from consumer.contract.refusals import ParkReason
from consumer.phases import LEGAL_MOVES, TransactionPhase
from consumer.version import installed_version
from domains.policies.rules import Outcome

# Seconds, from half of an idle worker's value to the timeout that bounds it, each about twice the last.
# Measured on two cores: a transaction of one run 3.5 ms (p99 10), of 50 runs 19 ms (p99 75); a lock wait ends at 5 s.
_TRANSACTION_BUCKETS = (0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Events of one run 1 ms (p99 5), of 50 runs 42 ms (p99 200), of 200 runs 180 ms (p99 640); confirms end at 10 s.
_PUBLISH_BUCKETS = (0.0005, 0.001, *_TRANSACTION_BUCKETS)
# Idle 5 ms (p99 15), at 800 runs per second 15 to 50 ms (p99 230). The rest is backlog: alerts begin at 60 and 300.
_LAG_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
# Runs. 1 while idle, 5 to 15 at 800 per second, BATCH_MAX_RUNS (200 by default) with a backlog.
_BATCH_BUCKETS = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 500)

_MODES = ("atomic", "legacy")
_SETTLED = ("committed", "duplicate", "parked", "retried", "requeued")
_ENDED = ("committed", "rolled_back", "failed")
_SHADOWED = ("flag", "suppress_incident", "error")
_UNDOABLE = tuple(phase for phase, moves in LEGAL_MOVES.items() if TransactionPhase.ROLLED_BACK in moves)
_ENTERED = tuple(phase for phase in TransactionPhase if phase is not TransactionPhase.NOT_STARTED)


class Described(NamedTuple):
    """The documentation of one metric: its meaning, the meaning of a rise, and what to do."""

    name: str
    labels: tuple[str, ...]
    meaning: str
    rise: str
    to_do: str


class Metrics:
    """The worker's metrics in a separate registry, so that a process may have several."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.described: list[Described] = []
        self._count_work()
        self._count_events()
        self._measure()
        self._show_the_outbox()
        self._show_the_worker()

    def _count_work(self) -> None:
        self.deliveries = self._counter(
            "closeout_deliveries_total",
            "Deliveries, by settlement.",
            rise="parked: a message cannot be processed; retried: one run fails repeatedly; requeued: a server is "
            "unavailable; duplicate: runners resend, which is harmless.",
            to_do="`closeout parked list`; the worker's log names retried runs and the unavailable server.",
            result=_SETTLED,
        )
        self.transactions = self._counter(
            "closeout_transactions_total",
            "Runs that an attempt committed or rolled back, by path; failed: the server did not confirm the rollback.",
            rise="rolled_back, failed: PostgreSQL has problems, or a run cannot be written; legacy: no atomicity.",
            to_do="Read error_type in `governance.rollbacks`; set `TRANSACTION_COORDINATOR_ENABLED=true`.",
            mode=_MODES,
            result=_ENDED,
        )
        self.phase_entered = self._counter(
            "closeout_phase_entered_total",
            "Runs that entered each phase; phases before COMMITTED are counted at the commit.",
            rise="ROLLED_BACK, FAILED: attempts fail, see closeout_rollbacks_total. All others rise together.",
            to_do="If the counts of two consecutive phases differ, runs stop between them: run `closeout reconcile`.",
            phase=_ENTERED,
        )
        self.rollbacks = self._counter(
            "closeout_rollbacks_total",
            "Runs whose attempt was rolled back, by the phase reached; a bad run rolls back its batch.",
            rise="PostgreSQL has problems, or a run cannot be written.",
            to_do="Read error_type and phase_reached in `governance.rollbacks`.",
            phase=_UNDOABLE,
        )
        self.legacy_fallbacks = self._counter(
            "closeout_legacy_fallbacks_total",
            "Runs closed out on the legacy path after their transaction failed (`LEGACY_FALLBACK_ENABLED`).",
            rise="Transactions fail, and the fallback hides it.",
            to_do="Find the cause in the log; disable the fallback once transactions succeed.",
        )
        self.parked = self._counter(
            "closeout_parked_total",
            "Messages parked, by reason.",
            rise="A runner sends invalid messages; attempts_exhausted: a run cannot be written.",
            to_do="`closeout parked list`, fix the cause, `closeout parked replay`.",
            reason=get_args(ParkReason),
        )
        self.message_adjustments = self._counter(
            "closeout_message_adjustments_total",
            "Closed-out runs for which a value of this field was changed, truncated or dropped.",
            rise="A runner sends values that are not in the strict form; its runs are still closed out.",
            to_do="`closeout runs show` prints what was changed, `closeout publish --check` what would be.",
            field=ADJUSTABLE_FIELDS,
        )
        self.policy_evaluations = self._counter(
            "closeout_policy_evaluations_total",
            "Policy evaluations of closed-out runs, by outcome; evaluation_error: at least one condition failed.",
            rise="evaluation_error: an enforced policy has no effect on these runs. violation: policies match.",
            to_do="`policy_evaluations.errors` names the policy and the error; test it with `closeout policies test`.",
            outcome=get_args(Outcome),
        )
        self.policy_shadow = self._counter(
            "closeout_policy_shadow_total",
            "Results of shadow policies on closed-out runs.",
            rise="A shadow policy matches runs; error: its condition fails to evaluate.",
            to_do="`closeout policies shadow`; fix failing conditions before you enforce them.",
            result=_SHADOWED,
        )

    def _count_events(self) -> None:
        self.events_published = self._counter(
            "closeout_events_published_total",
            "Events that RabbitMQ confirmed.",
            rise="More runs. A fall while commits continue: the broker does not confirm.",
            to_do="See closeout_outbox_oldest_seconds.",
            type=get_args(EventType),
        )
        self.events_unroutable = self._counter(
            "closeout_events_unroutable_total",
            "Events that were unroutable (no queue bound), counted at each attempt.",
            rise="A subscriber's binding is missing.",
            to_do="Bind a queue to `governance.events`; until then no subscriber receives these events.",
            type=get_args(EventType),
        )

    def _measure(self) -> None:
        self.transaction_duration = self._histogram(
            "closeout_transaction_duration_seconds",
            "Time from connection to commit of one transaction: a batch (atomic) or a run (legacy).",
            _TRANSACTION_BUCKETS,
            rise="PostgreSQL is slow, waits for locks, or batches are larger.",
            to_do="Compare closeout_batch_runs; then check for locks and slow disks.",
            labels=("mode",),
        )
        self.publish_duration = self._histogram(
            "closeout_publish_duration_seconds",
            "Time from the first publish of a batch's events to the last confirm.",
            _PUBLISH_BUCKETS,
            rise="RabbitMQ's disk is slow, a replica is lost, or an alarm is active.",
            to_do="`rabbitmq-diagnostics alarms`; check the subscribers' queues.",
        )
        self.completion_lag = self._histogram(
            "closeout_completion_lag_seconds",
            "Time from a run's completion, by the runner's clock, to its commit.",
            _LAG_BUCKETS,
            rise="Runs arrive faster than they are closed out, there was an outage, or old runs were resent.",
            to_do="Add workers; check closeout_consumer_paused and the length of the queue.",
        )
        self.batch_runs = self._histogram(
            "closeout_batch_runs",
            "Runs in one atomic transaction.",
            _BATCH_BUCKETS,
            rise="The load rises. Constantly at `BATCH_MAX_RUNS`: this worker is at its limit.",
            to_do="Add workers before the lag grows.",
        )

    def _show_the_outbox(self) -> None:
        self.outbox_pending = self._gauge(
            "closeout_outbox_pending",
            "Runs with committed, unconfirmed events, up to 10,000; all workers report the same outbox.",
            rise="RabbitMQ does not confirm, or `REQUIRE_EVENT_SUBSCRIBERS` keeps unroutable events.",
            to_do='The worker\'s log has the reason ("events not published").',
        )
        self.outbox_oldest = self._gauge(
            "closeout_outbox_oldest_seconds",
            "Age of the oldest event in the outbox; NaN while PostgreSQL is unavailable.",
            rise="Above 15 s: the relay cannot publish.",
            to_do="As for closeout_outbox_pending; `closeout reconcile --repair` once RabbitMQ confirms again.",
        )

        self.outbox_set_aside = self._gauge(
            "closeout_outbox_set_aside",
            "Runs whose events are set aside, because RabbitMQ refuses one or no message can hold it.",
            rise="A topic permission lacks a routing key, an event exceeds the broker's limit, or a row was edited.",
            to_do="`closeout outbox status` names the reasons. The relay tries again every minute.",
        )

    def _show_the_worker(self) -> None:
        self.inflight = self._gauge(
            "closeout_inflight_deliveries",
            "Deliveries received and not yet settled.",
            rise="Constantly at `PREFETCH_COUNT`: this worker is at its limit.",
            to_do="Add workers. If nothing is settled meanwhile, the worker hangs: see the on-call guide.",
        )
        self.paused = self._gauge(
            "closeout_consumer_paused",
            "1 while this worker does not consume: it is starting, or a server is unavailable.",
            rise="PostgreSQL or RabbitMQ is unavailable, or migration or topology is missing.",
            to_do="`/readyz` names the server, and since when.",
        )
        self.parking_refused = self._gauge(
            "closeout_parking_refused",
            "1 while the parked queue refuses this worker's messages, and they are delayed.",
            rise="The queue is at its limit or missing, or the worker lacks the permission to write to it.",
            to_do="`/readyz` has the reason. Replay or discard parked messages, or raise the limit.",
        )
        self.intake_queue_unavailable = self._gauge(
            "closeout_intake_queue_unavailable",
            "1 while this worker cannot consume this queue and consumes others (`INTAKE_QUEUES` above 1).",
            rise="The queue is missing, has no leader, or the worker lacks the permission to read it.",
            to_do="`/readyz` has the reason. The worker tries again every few seconds.",
            labels=("queue",),
        )
        self.coordinator_enabled = self._gauge(
            "closeout_coordinator_enabled",
            "1 if `TRANSACTION_COORDINATOR_ENABLED`, even if for some tenants only.",
            rise="None. A fall to 0: runs are closed out without atomicity.",
            to_do="Set it to true and restart.",
        )
        build = self._gauge(
            "closeout_build_info",
            "1; the label is the running version.",
            rise="None. Two versions at once: a deployment is in progress, or stuck.",
            to_do="Nothing, unless it stays.",
            labels=("version",),
        )
        build.labels(installed_version()).set(1)

    def _counter(self, name: str, meaning: str, *, rise: str, to_do: str, **values: Iterable[str]) -> Counter:
        made = Counter(
            name,
            self._describe(name, meaning, rise, to_do, labels=tuple(values)),
            tuple(values),
            registry=self.registry,
        )
        for combination in product(*values.values()):
            if combination:
                made.labels(*combination)
        return made

    def _histogram(
        self,
        name: str,
        meaning: str,
        buckets: tuple[float, ...],
        *,
        rise: str,
        to_do: str,
        labels: tuple[str, ...] = (),
    ) -> Histogram:
        text = self._describe(name, meaning, rise, to_do, labels=labels)
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *, rise: str, to_do: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, self._describe(name, meaning, rise, to_do, labels=labels), labels, registry=self.registry)

    def _describe(self, name: str, meaning: str, rise: str, to_do: str, *, labels: tuple[str, ...]) -> str:
        self.described.append(Described(name, labels, meaning, rise, to_do))
        return f"{meaning} Rising: {rise} To do: {to_do}"
