"""Metrics in their initial state."""

from datetime import UTC, datetime
from typing import get_args

from prometheus_client import generate_latest

from consumer.contract.events import EventType
from consumer.contract.refusals import ParkReason
from consumer.health import Health
from consumer.metrics import Metrics

# The metrics of the contract, verbatim.
CONTRACT = {
    "closeout_deliveries_total": ("result",),
    "closeout_transactions_total": ("mode", "result"),
    "closeout_transaction_duration_seconds": ("mode",),
    "closeout_phase_entered_total": ("phase",),
    "closeout_rollbacks_total": ("phase",),
    "closeout_legacy_fallbacks_total": (),
    "closeout_batch_runs": (),
    "closeout_completion_lag_seconds": (),
    "closeout_events_published_total": ("type",),
    "closeout_events_unroutable_total": ("type",),
    "closeout_publish_duration_seconds": (),
    "closeout_outbox_pending": (),
    "closeout_outbox_oldest_seconds": (),
    "closeout_message_adjustments_total": ("field",),
    "closeout_policy_evaluations_total": ("outcome",),
    "closeout_outbox_set_aside": (),
    "closeout_parking_refused": (),
    "closeout_parked_total": ("reason",),
    "closeout_inflight_deliveries": (),
    "closeout_consumer_paused": (),
    "closeout_coordinator_enabled": (),
    "closeout_build_info": ("version",),
}


# In addition to the contract's.
ALSO = {"closeout_policy_shadow_total": ("result",), "closeout_intake_queue_unavailable": ("queue",)}


def test_the_metrics_are_those_of_the_contract_and_those_listed_here():
    assert {metric.name: metric.labels for metric in Metrics().described} == CONTRACT | ALSO


def test_every_metric_help_states_its_meaning_and_what_to_do():
    for metric in Metrics().described:
        for words in (metric.meaning, metric.rise, metric.to_do):
            assert words.endswith("."), metric.name


def test_every_label_value_starts_at_zero(metrics):
    """A counter that is created by its first event starts at 1, and no increase is visible."""
    value = metrics.registry.get_sample_value
    for result in ("committed", "duplicate", "parked", "retried", "requeued"):
        assert value("closeout_deliveries_total", {"result": result}) == 0
    for reason in get_args(ParkReason):
        assert value("closeout_parked_total", {"reason": reason}) == 0
    for kind in get_args(EventType):
        assert value("closeout_events_published_total", {"type": kind}) == 0
        assert value("closeout_events_unroutable_total", {"type": kind}) == 0
    assert value("closeout_legacy_fallbacks_total") == 0


def test_a_new_worker_reports_that_it_is_paused(metrics):
    health = Health(metrics, clock=lambda: datetime(2026, 11, 1, tzinfo=UTC))
    assert metrics.registry.get_sample_value("closeout_consumer_paused") == 1
    health.consuming()
    assert metrics.registry.get_sample_value("closeout_consumer_paused") == 0
    health.paused("PostgreSQL is unavailable")
    assert metrics.registry.get_sample_value("closeout_consumer_paused") == 1


def test_several_metrics_registries_can_exist_in_one_process():
    assert generate_latest(Metrics().registry).splitlines()[0] == generate_latest(Metrics().registry).splitlines()[0]
