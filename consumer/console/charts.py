"""Geometry of the charts; pure functions. Templates render it as SVG without scripts or inline styles."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil, floor, log10

from consumer.console.formatting import clock, rate, span
from consumer.console.history import SLOT_SECONDS, Slot

# Units of the drawing, which is stretched to the page's width: only proportions matter.
WIDTH, HEIGHT = 1_000.0, 100.0
# Share of a column's width; the rest separates bars.
_BAR = 0.8


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle and its tooltip."""

    x: float
    y: float
    width: float
    height: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class RateChart:
    """Runs per second, one bar per column; below it a mark where something was rolled back or parked."""

    top: float
    bars: Sequence[Bar]
    troubles: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class LagChart:
    """Two lines through the middles of the columns, with gaps where nothing was committed; and tooltips."""

    top: float
    median: str
    most: str
    columns: Sequence[Bar]


def rate_chart(slots: Sequence[Slot], now: float, *, columns: int) -> RateChart:
    """Return the chart of runs committed per second; the last of *columns* contains *now*."""
    top = round_up(max((slot.per_second for slot in slots), default=0.0))
    wide = WIDTH / columns
    bars, troubles = [], []
    for slot in slots:
        x, width = _x(slot, now, columns) + wide * (1 - _BAR) / 2, round(wide * _BAR, 2)
        height = round(HEIGHT * slot.per_second / top, 2)
        text = f"{_time(slot)}: {rate(slot.per_second)} runs/s"
        if slot.trouble:
            text += f", {slot.trouble:,.0f} rolled back or parked"
            troubles.append(Bar(x, 0, width, 10, text))
        bars.append(Bar(x, round(HEIGHT - height, 2), width, height, text))
    return RateChart(top, bars, troubles)


def lag_chart(slots: Sequence[Slot], now: float, *, columns: int) -> LagChart:
    """Return the chart of the lag from a run's end to its commit, with the same columns."""
    top = round_up_time(max((slot.lag_most or 0.0 for slot in slots), default=0.0))
    wide = WIDTH / columns
    places = [(_x(slot, now, columns), slot) for slot in slots]
    return LagChart(
        top=top,
        median=_line([(x + wide / 2, slot.lag_median) for x, slot in places], top, wide),
        most=_line([(x + wide / 2, slot.lag_most) for x, slot in places], top, wide),
        columns=[Bar(x, 0, wide, HEIGHT, _lag_text(slot)) for x, slot in places if slot.lag_median is not None],
    )


def round_up_time(seconds: float) -> float:
    """Return a duration of at least *seconds*, in one unit, which fits next to the chart."""
    for unit in (86_400.0, 3_600.0, 60.0):
        if seconds > unit:
            return ceil(round_up(seconds / unit)) * unit
    return min(round_up(seconds), 60.0)


def round_up(value: float) -> float:
    """Return the least of 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, ... that is at least *value*; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(
        step * power for step in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0) if step * power >= value * (1 - 1e-9)
    )


def _x(slot: Slot, now: float, columns: int) -> float:
    return (slot.start // SLOT_SECONDS - now // SLOT_SECONDS + columns - 1) * WIDTH / columns


def _line(points: Sequence[tuple[float, float | None]], top: float, wide: float) -> str:
    path, before = [], None
    for x, value in points:
        if value is not None:
            joined = before is not None and x - before <= wide * 1.01
            y = HEIGHT * (1 - value / top)
            # A line starts with a dash, so that a single column is visible.
            path.append(f"L{x:g} {y:.2f}" if joined else f"M{x - wide / 4:g} {y:.2f}h{wide / 4:g}")
            before = x
    return "".join(path)


def _lag_text(slot: Slot) -> str:
    return f"{_time(slot)}: half within {span(slot.lag_median)}, 95% within {span(slot.lag_most)}"


def _time(slot: Slot) -> str:
    return clock(datetime.fromtimestamp(slot.start, UTC))
