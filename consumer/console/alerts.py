"""The alerts of the overview. Pure functions."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from consumer.console.formatting import ago, span, when
from consumer.console.overview_data import Picture
from consumer.wording import counted

# Seconds. The relay publishes stale events within 15 s; after a minute something prevents it.
_OUTBOX_LATE_SECONDS = 60.0
# Older rollbacks cause no alert.
_NEWS = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert: ``bad`` needs action now, ``watch`` can wait until working hours."""

    level: Literal["bad", "watch"]
    text: str


def alerts_of(picture: Picture) -> list[Alert]:
    """Return the alerts of *picture*, most severe first; empty if all is well."""
    found = [*_away(picture), *_late(picture), *_parked(picture), *_settings(picture)]
    return sorted(found, key=lambda trouble: trouble.level != "bad")


def _away(picture: Picture) -> list[Alert]:
    found = []
    if picture.reason == "starting":
        found.append(Alert("watch", "This worker is starting and does not consume yet."))
    elif picture.reason is not None:
        paused = f"This worker has not consumed since {when(picture.since, picture.now)} UTC: {picture.reason}"
        found.append(Alert("bad", paused))
    # An idle worker does not notice an unavailable server; if it does, the server is still listed once.
    others = {fault: is_slow for fault, is_slow in picture.faults.items() if fault != picture.reason}
    return found + [Alert("watch" if is_slow else "bad", fault) for fault, is_slow in others.items()]


def _late(picture: Picture) -> list[Alert]:
    waiting = picture.waiting.value
    found = []
    if waiting is not None and picture.waiting.fault is None and waiting.oldest_seconds > _OUTBOX_LATE_SECONDS:
        many = f"{waiting.runs:,} committed runs or more"
        runs = many if waiting.is_cut else counted(waiting.runs, "committed run")
        text = f"Events of {runs} are not published, the oldest for {span(waiting.oldest_seconds)}: "
        text += "RabbitMQ does not confirm them, or no queue is bound for them."
        found.append(Alert("bad", text))
    newest = next(iter(picture.rollbacks.value or ()), None)
    if newest is not None and picture.now - newest["occurred_at"] < _NEWS:
        text = f"The last attempt was rolled back {ago(newest['occurred_at'], picture.now)}: {newest['error_type']}."
        found.append(Alert("watch", text))
    return found


def _parked(picture: Picture) -> list[Alert]:
    depths = picture.depths.value
    if depths is None or not depths.parked or picture.depths.fault is not None:
        return []
    count = "1 message is" if depths.parked == 1 else f"{depths.parked:,} messages are"
    return [Alert("watch", f"{count} parked; run closeout parked list for the reasons.")]


def _settings(picture: Picture) -> list[Alert]:
    found = []
    if not picture.is_atomic:
        text = "TRANSACTION_COORDINATOR_ENABLED is false: each run is closed out with three separate writes."
        found.append(Alert("bad", text))
    if picture.counts.fallbacks:
        runs = counted(int(picture.counts.fallbacks), "run was", "runs were")
        text = f"{runs} closed out without atomicity after their transaction failed."
        found.append(Alert("watch", text))
    return found
