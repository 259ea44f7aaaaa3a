"""What of a picture a person must know first: pure."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from consumer.console.formatting import ago, span, when
from consumer.console.overview_data import Picture
from consumer.wording import counted

# Seconds. The relay publishes what was left behind within 15 s; after a minute something keeps it from doing so.
_OUTBOX_LATE_SECONDS = 60.0
# A rollback that is older than this is history, not news.
_NEWS = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing to know: ``bad`` needs an action now, ``watch`` a look in daylight."""

    level: Literal["bad", "watch"]
    words: str


def troubles_of(picture: Picture) -> list[Trouble]:
    """Return what is wrong in *picture*, what is worst first; empty when all is well."""
    found = [*_away(picture), *_late(picture), *_parked(picture), *_settings(picture)]
    return sorted(found, key=lambda trouble: trouble.level != "bad")


def _away(picture: Picture) -> list[Trouble]:
    found = []
    if picture.reason == "starting":
        found.append(Trouble("watch", "This worker is starting and does not consume yet."))
    elif picture.reason is not None:
        paused = f"Nothing is consumed by this worker since {when(picture.since, picture.now)} UTC: {picture.reason}"
        found.append(Trouble("bad", paused))
    # An idle worker does not notice that a server is away; where it does, the server is named once all the same.
    others = {fault: is_slow for fault, is_slow in picture.faults.items() if fault != picture.reason}
    return found + [Trouble("watch" if is_slow else "bad", fault) for fault, is_slow in others.items()]


def _late(picture: Picture) -> list[Trouble]:
    waiting = picture.waiting.value
    found = []
    if waiting is not None and picture.waiting.fault is None and waiting.oldest_seconds > _OUTBOX_LATE_SECONDS:
        many = f"{waiting.runs:,} committed runs or more"
        runs = many if waiting.is_cut else counted(waiting.runs, "committed run")
        words = f"Events of {runs} are not published, the oldest for "
        words += f"{span(waiting.oldest_seconds)}: RabbitMQ does not confirm them, or nobody subscribes to them."
        found.append(Trouble("bad", words))
    newest = next(iter(picture.rollbacks.value or ()), None)
    if newest is not None and picture.now - newest["occurred_at"] < _NEWS:
        words = f"The last attempt was rolled back {ago(newest['occurred_at'], picture.now)}: {newest['error_type']}."
        found.append(Trouble("watch", words))
    return found


def _parked(picture: Picture) -> list[Trouble]:
    depths = picture.depths.value
    if depths is None or not depths.parked or picture.depths.fault is not None:
        return []
    told = "1 message is" if depths.parked == 1 else f"{depths.parked:,} messages are"
    return [Trouble("watch", f"{told} parked; closeout parked list says which and why.")]


def _settings(picture: Picture) -> list[Trouble]:
    found = []
    if not picture.is_atomic:
        words = "TRANSACTION_COORDINATOR_ENABLED is false: runs are closed out with three separate writes."
        found.append(Trouble("bad", words))
    if picture.counts.fallbacks:
        runs = counted(int(picture.counts.fallbacks), "run was", "runs were")
        words = f"{runs} closed out without atomicity after their transaction failed."
        found.append(Trouble("watch", words))
    return found
