"""Geometry of the pictures: pure; templates write it as SVG, which needs no script and no style of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import floor, log10

from consumer.console.history import SLOT_SECONDS, SLOTS, Slot
from consumer.console.words import clock, rate, span

# Units of the drawing. It is stretched to the page's width, so only proportions count.
WIDTH, HEIGHT = SLOTS * 10, 100
_BAR = 8.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle and what it says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    words: str = ""


@dataclass(frozen=True, slots=True)
class RateChart:
    """Runs a second, a bar a column; below it a mark where something was rolled back or parked."""

    top: float
    bars: Sequence[Bar]
    troubles: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class LagChart:
    """Two lines through the columns' middles, with gaps where nothing was committed; and what each column says."""

    top: float
    median: str
    most: str
    columns: Sequence[Bar]


def rate_chart(columns: Sequence[Slot], now: float) -> RateChart:
    """Return the chart of runs committed a second."""
    top = round_up(max((slot.per_second for slot in columns), default=0.0))
    bars, troubles = [], []
    for slot in columns:
        x = _x(slot, now)
        height = round(HEIGHT * slot.per_second / top, 2)
        words = f"{_time(slot)}: {rate(slot.per_second)} runs/s"
        if slot.trouble:
            words += f", {slot.trouble:,.0f} rolled back or parked"
            troubles.append(Bar(x + 1, 0, _BAR, 10, words))
        bars.append(Bar(x + 1, HEIGHT - height, _BAR, height, words))
    return RateChart(top, bars, troubles)


def lag_chart(columns: Sequence[Slot], now: float) -> LagChart:
    """Return the chart of lag from a run's end to its commit."""
    top = round_up(max((slot.lag_most or 0.0 for slot in columns), default=0.0))
    return LagChart(
        top=top,
        median=_line([(_x(slot, now), slot.lag_median) for slot in columns], top),
        most=_line([(_x(slot, now), slot.lag_most) for slot in columns], top),
        columns=[
            Bar(_x(slot, now), 0, 10, HEIGHT, _lag_words(slot)) for slot in columns if slot.lag_median is not None
        ],
    )


def round_up(value: float) -> float:
    """Return the least of 1, 2, 5, 10, 20, ... that is not below *value*; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= value * (1 - 1e-9))


def _x(slot: Slot, now: float) -> float:
    return (slot.start // SLOT_SECONDS - now // SLOT_SECONDS + SLOTS - 1) * 10


def _line(points: Sequence[tuple[float, float | None]], top: float) -> str:
    words, before = [], None
    for x, value in points:
        if value is not None:
            joined = before is not None and x - before <= 10
            # A dot is a line of no length: with round ends it can be seen.
            words.append(f"{'L' if joined else 'M'}{x + 5:g} {HEIGHT * (1 - value / top):.2f}{'' if joined else 'h0'}")
            before = x
    return "".join(words)


def _lag_words(slot: Slot) -> str:
    return f"{_time(slot)}: half within {span(slot.lag_median)}, 95% within {span(slot.lag_most)}"


def _time(slot: Slot) -> str:
    return clock(datetime.fromtimestamp(slot.start, UTC))
