"""The console's charts, notices and timelines, computed from counters and rows."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.console import run_view as one_run
from consumer.console.alerts import alerts_of
from consumer.console.charts import HEIGHT, WIDTH, lag_chart, rate_chart, round_up, round_up_time
from consumer.console.history import (
    SLOT_SECONDS,
    SLOTS,
    Counts,
    History,
    columns_since,
    lately,
    parked_by_reason,
    quantile,
    read_counts,
    slots,
)
from consumer.console.overview_data import Picture, by_reason
from consumer.console.queries import Pace
from consumer.console.queue_depths import Depths
from consumer.console.rendering import Rendering
from consumer.console.shared_reads import Snapshot
from consumer.metrics import Metrics
from consumer.outbox.backlog import Pending
from consumer.runs.lookup import RunFile

START = 1_793_000_004.0  # a multiple of the columns' width
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


def test_the_counters_are_read_by_name_and_label():
    metrics = Metrics()
    metrics.deliveries.labels("duplicate").inc(3)
    metrics.transactions.labels("atomic", "committed").inc(5)
    metrics.transactions.labels("legacy", "committed").inc(2)
    metrics.rollbacks.labels("NOT_STARTED").inc()
    metrics.rollbacks.labels("TRACE_COMPLETED").inc()
    metrics.events_published.labels("run.finalized").inc(7)
    metrics.parked.labels("too_large").inc()
    metrics.parked.labels("invalid_json").inc(2)
    metrics.legacy_fallbacks.inc()
    metrics.completion_lag.observe(0.03)
    counts = read_counts(metrics, START)
    assert (counts.committed, counts.duplicates, counts.rolled_back, counts.events) == (7, 3, 2, 7)
    assert counts.fallbacks == 1
    assert dict(counts.lags)[0.02] == 0
    assert dict(counts.lags)[0.05] == 1
    assert list(parked_by_reason(metrics).items()) == [("invalid_json", 2), ("too_large", 1)]


def test_columns_start_at_multiples_of_their_width_and_hold_their_counts():
    samples = [Counts(START + 2 * beat, committed=10.0 * beat) for beat in range(10)]
    found = slots(samples, START + 18)
    assert [slot.start for slot in found] == [START, START + 6, START + 12, START + 18]
    assert [slot.committed for slot in found] == [20, 30, 30, 10]
    assert [slot.per_second for slot in found] == [5, 5, 5, 5]


def test_one_sample_makes_no_column_and_a_gap_is_averaged():
    assert slots([Counts(START, committed=1)], START) == []
    assert slots([], START) == []
    (slot,) = slots([Counts(START), Counts(START + 60, committed=120)], START + 60)
    assert slot.per_second == 2


def test_a_history_keeps_ten_minutes():
    history = History(Metrics())
    for beat in range(1_000):
        history.sample(START + 2 * beat)
    kept = history.samples()
    assert len(kept) < 320
    assert len(slots(kept, START + 1_998)) <= SLOTS


def test_the_current_rate_covers_the_last_ten_seconds():
    samples = [Counts(START + 2 * beat, events=30.0 * beat) for beat in range(100)]
    now = lately(samples, START + 198)
    assert now is not None
    assert now.events / now.seconds == 15
    assert lately(samples[:1], START) is None


def test_the_charts_of_a_new_worker_cover_less_time():
    assert [columns_since(START - age, START) for age in (0, 60, 119, 250, 400, 10_000)] == [20, 20, 50, 50, 100, 100]
    assert columns_since(None, START) == 20


def test_a_quantile_is_computed_as_prometheus_does():
    lags = [(0.1, 10.0), (0.5, 90.0), (1.0, 100.0), (float("inf"), 100.0)]
    assert quantile(lags, 0.5) == pytest.approx(0.3)
    assert quantile(lags, 0.95) == pytest.approx(0.75)
    assert quantile([(1.0, 0.0), (float("inf"), 5.0)], 0.5) == 1.0
    assert quantile([(1.0, 0.0), (float("inf"), 0.0)], 0.5) is None
    assert quantile([], 0.5) is None


@given(st.floats(min_value=1e-3, max_value=1e6))
def test_an_axis_ends_at_a_round_number_close_above_its_maximum(value):
    top = round_up(value)
    assert value * (1 - 1e-6) <= top <= value * 1.6


@pytest.mark.parametrize(
    ("seconds", "top"),
    [(0.03, 0.03), (7, 8), (51, 60), (61, 120), (400, 480), (3_599, 3_600), (3_700, 7_200), (90_000, 172_800)],
)
def test_a_time_axis_ends_at_whole_minutes_hours_or_days(seconds, top):
    assert round_up_time(seconds) == pytest.approx(top)


def test_an_empty_axis_ends_at_one():
    assert round_up(0) == 1


@given(st.lists(st.tuples(st.integers(0, 5_000), st.booleans()), min_size=2, max_size=300))
def test_every_bar_and_line_stays_within_its_chart(beats):
    committed, samples = 0.0, []
    for beat, (more, trouble) in enumerate(beats):
        committed += more
        lags = ((0.5, committed / 2), (5.0, committed), (float("inf"), committed))
        samples.append(Counts(START + 2 * beat, committed=committed, parked=float(trouble), lags=lags))
    now = samples[-1].at
    columns = columns_since(samples[0].at, now)
    rates = rate_chart(slots(samples, now), now, columns=columns)
    for bar in [*rates.bars, *rates.troubles, *lag_chart(slots(samples, now), now, columns=columns).columns]:
        assert bar.x >= 0
        assert bar.x + bar.width <= WIDTH + 0.01
        assert bar.y >= 0
        assert bar.y + bar.height <= HEIGHT + 0.01
        assert bar.text


def test_a_line_has_a_gap_where_nothing_was_committed():
    bounds = (0.5, float("inf"))
    totals = [0.0, 4.0, 4.0, 4.0, 8.0, 12.0]
    samples = [
        Counts(START + SLOT_SECONDS * n, committed=t, lags=tuple((b, t) for b in bounds)) for n, t in enumerate(totals)
    ]
    chart = lag_chart(slots(samples, samples[-1].at), samples[-1].at, columns=20)
    assert chart.median.count("M") == 2
    assert chart.median.count("L") == 1


def picture(**changes: Any) -> Picture:
    clock = NOW.timestamp()
    fields: dict[str, Any] = {
        "now": NOW, "worker": "host:1", "version": "1", "reason": None, "since": NOW - timedelta(hours=1),
        "is_atomic": True, "inflight": 0, "counts": Counts(clock), "lately": None, "minutes": 2,
        "rates": rate_chart([], clock, columns=20), "lags": lag_chart([], clock, columns=20), "reasons": {},
        "parked_lately": [], "depths": Snapshot(Depths(0, 0, 0, 1), NOW), "waiting": Snapshot(Pending(0, 0.0), NOW),
        "pace": Snapshot(Pace(0, None, None), NOW), "rollbacks": Snapshot([], NOW), "runs": Snapshot([], NOW),
    }  # fmt: skip
    return Picture(**{**fields, **changes})


def words(**changes: Any) -> list[tuple[str, str]]:
    return [(trouble.level, trouble.text) for trouble in alerts_of(picture(**changes))]


def test_a_healthy_service_has_no_notices():
    assert words() == []


def test_an_unavailable_server_is_named_once_for_worker_and_console():
    away = "PostgreSQL is not available: connection refused"
    ((level, message),) = words(reason=away, waiting=Snapshot(fault=away), runs=Snapshot(fault=away))
    assert level == "bad"
    assert message.endswith(f"since 11:00:00 UTC: {away}")
    assert f"since {NOW - timedelta(days=2):%m-%d} 12:00 UTC" in words(reason=away, since=NOW - timedelta(days=2))[0][1]


def test_a_failed_console_read_is_a_notice_and_a_slow_one_is_not():
    slow: Snapshot[Any] = Snapshot(fault="PostgreSQL: query canceled after 3 s", is_slow=True)
    assert words(depths=Snapshot(fault="RabbitMQ is not available: x"), runs=slow, pace=slow) == [
        ("bad", "RabbitMQ is not available: x"),
        ("watch", "PostgreSQL: query canceled after 3 s"),
    ]


def test_a_starting_worker_is_not_an_alarm():
    assert [level for level, _ in words(reason="starting")] == ["watch"]


def test_events_older_than_the_relay_delay_are_an_alarm():
    assert words(waiting=Snapshot(Pending(3, 59.0), NOW)) == []
    ((level, message),) = words(waiting=Snapshot(Pending(1_234, 300.0), NOW))
    assert level == "bad"
    assert "1,234 committed runs" in message
    assert "5 min" in message
    assert "Events of 1 committed run are not" in words(waiting=Snapshot(Pending(1, 300.0), NOW))[0][1]
    assert (
        "Events of 10,000 committed runs or more are not" in words(waiting=Snapshot(Pending(10_000, 300.0), NOW))[0][1]
    )
    # The last known state of an unavailable server is not reported as new.
    assert [message for _, message in words(waiting=Snapshot(Pending(1, 300.0), NOW, "away"))] == ["away"]


def test_parked_messages_rollbacks_fallbacks_and_the_disabled_coordinator_are_notices():
    row = {"occurred_at": NOW - timedelta(seconds=90), "error_type": "DeadlockDetectedError"}
    assert ("watch", "The last attempt was rolled back 1 min 30 s ago: DeadlockDetectedError.") in words(
        rollbacks=Snapshot([row], NOW)
    )
    assert words(rollbacks=Snapshot([{**row, "occurred_at": NOW - timedelta(minutes=6)}], NOW)) == []
    assert "1 message is parked" in words(depths=Snapshot(Depths(0, 0, 1, 1), NOW))[0][1]
    assert "2,000 messages are parked" in words(depths=Snapshot(Depths(0, 0, 2_000, 1), NOW))[0][1]
    assert "without atomicity" in words(counts=Counts(0.0, fallbacks=2.0))[0][1]
    assert words(is_atomic=False, depths=Snapshot(Depths(0, 0, 1, 1), NOW))[0][0] == "bad"


def test_rollbacks_are_shown_by_reason():
    rows = [{"phase_reached": "NOT_STARTED", "error_type": kind, "error": "x", "n": n} for n, kind in enumerate("abab")]
    assert [(reason.error_type, len(reason.rows)) for reason in by_reason(rows)] == [("a", 2), ("b", 2)]


def run_file(**changes: Any) -> RunFile:
    completion = {
        "tenant_id": "acme", "run_id": uuid4(), "phase": "EVENTS_PUBLISHED",
        "started_at": NOW - timedelta(minutes=1), "completed_at": NOW, "received_at": NOW + timedelta(seconds=1),
        "committed_at": NOW + timedelta(seconds=1.5), "events_published_at": NOW + timedelta(seconds=2),
    }  # fmt: skip
    parts = {name: changes.pop(name, None) for name in ("incident", "prevention_record", "policy_evaluation", "trace")}
    parts["suppressing_policy"] = None
    outbox = changes.pop("outbox", [])
    return RunFile(completion={**completion, **changes}, outbox=outbox, rollbacks=[], children=[], **parts)


def test_a_timeline_has_every_phase_and_marks_those_not_reached():
    marks = one_run.marks(run_file(phase="INCIDENT_CREATED", incident={"created_at": NOW}))
    assert [mark.name for mark in marks if mark.is_reached] == [
        "run started", "run ended", "received", "incident created",
    ]  # fmt: skip
    assert [mark.name for mark in marks if not mark.is_reached] == [
        "policies evaluated", "trace completed", "committed", "events published",
    ]  # fmt: skip


def test_a_timeline_marks_another_day_and_names_a_prevention_record():
    started = NOW.replace(hour=0) - timedelta(seconds=1)
    marks = one_run.marks(run_file(started_at=started, prevention_record={"created_at": NOW}))
    assert [mark.is_other_day for mark in marks[:2]] == [False, True]
    assert "prevention recorded" in {mark.name for mark in marks}


def test_the_time_from_run_end_to_last_event_is_split_into_three_parts():
    found = one_run.stretches(run_file())
    assert [(s.kind, s.seconds) for s in found] == [("waited", 1.0), ("closed-out", 0.5), ("published", 0.5)]
    assert found[0].width == pytest.approx(2 * found[1].width, abs=0.2)


def test_clock_skew_causes_no_negative_duration_and_missing_times_have_none():
    found = one_run.stretches(run_file(received_at=NOW - timedelta(seconds=1), events_published_at=None))
    assert [(s.kind, s.seconds) for s in found] == [("waited", 0.0), ("closed-out", 2.5)]


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**63 - 1)), max_size=1_000))
def test_steps_are_drawn_end_to_end_and_each_is_visible(durations):
    steps = [{"index": n, "duration_ms": took} for n, took in enumerate(durations)]
    bars = one_run.step_bars(run_file(trace={"steps": steps[::-1]}))
    assert [bar.step["index"] for bar in bars] == list(range(len(durations)))
    for bar in bars:
        assert bar.width > 0
        assert bar.x >= 0
        assert bar.x + bar.width <= one_run.WIDTH + 0.2


_STARTS = st.one_of(st.none(), st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat))


@given(st.lists(st.tuples(_STARTS, st.one_of(st.none(), st.floats(0, 2**63))), max_size=100))
def test_steps_with_any_start_are_drawn_within_the_page(times):
    steps = [{"index": n, "started_at": start, "duration_ms": took} for n, (start, took) in enumerate(times)]
    for bar in one_run.step_bars(run_file(trace={"steps": steps})):
        assert bar.width > 0
        assert bar.x >= 0
        assert bar.x + bar.width <= one_run.WIDTH + 0.2


def test_parallel_steps_are_drawn_in_parallel_and_one_without_a_start_follows_the_one_before():
    times = [(0, 1_000), (1, 2_000), (1, 1_000), (None, 1_000)]
    steps = [
        {"index": n, "started_at": start if start is None else (NOW + timedelta(seconds=start)).isoformat(),
         "duration_ms": took}
        for n, (start, took) in enumerate(times)
    ]  # fmt: skip
    bars = one_run.step_bars(run_file(trace={"steps": steps}))
    assert bars[1].x == bars[2].x == pytest.approx(one_run.WIDTH / 3, abs=2)
    assert bars[3].x == pytest.approx(2 * bars[1].x, abs=0.2)


def test_events_are_unpublished_or_confirmed_and_absent_before_the_last_write():
    waiting = [{"type": "run.finalized", "created_at": NOW}]
    found = one_run.events(run_file(outbox=waiting, phase="COMMITTED", events_published_at=None))
    assert [(e.type, e.is_confirmed) for e in found] == [
        ("incident.created", True), ("policy.evaluated", True), ("run.finalized", False),
    ]  # fmt: skip
    assert one_run.events(run_file(committed_at=None, phase="INCIDENT_CREATED")) == []
    assert one_run.events(run_file(prevention_record={"created_at": NOW}))[0].type == "incident.suppressed"


async def test_a_count_at_its_limit_is_shown_as_a_minimum():
    async def shown(runs: int, waiting: int) -> list[str]:
        seen = picture(pace=Snapshot(Pace(runs, 0.1, 0.2), NOW), waiting=Snapshot(Pending(waiting, 1.0), NOW))
        page = await Rendering().text("live.html", picture=seen, alerts=[])
        return re.findall(r'<b class="figure">([\d,+]+)<', page)

    assert {"4,999", "9,999"} < set(await shown(49_990, 9_999))
    assert {"5,000+", "10,000+"} < set(await shown(50_000, 10_000))
