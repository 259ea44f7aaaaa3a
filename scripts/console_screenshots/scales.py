"""Numbers on axes and tiles, in the units that the dashboard names."""

import math
from collections.abc import Sequence

BYTES = ("B", "KiB", "MiB", "GiB")


def in_words(value: float, unit: str, decimals: int | None = None) -> str:
    """Return *value* of Grafana's *unit* as a person reads it."""
    if math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{_short(value * 100, decimals)}%"
    if unit == "s":
        return _seconds(value, decimals)
    if unit == "bytes":
        power = min(int(math.log(value, 1024)) if value >= 1 else 0, len(BYTES) - 1)
        return f"{_short(value / 1024**power, decimals)} {BYTES[power]}"
    return _short(value, decimals) + (" /s" if unit == "ops" else "")


def _seconds(value: float, decimals: int | None) -> str:
    if 0 < value < 1:
        return f"{_short(value * 1000, decimals)} ms"
    return f"{_short(value / 60, decimals)} min" if value >= 120 else f"{_short(value, decimals)} s"


def _short(value: float, decimals: int | None) -> str:
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ticks(top: float, unit: str, wanted: int = 4) -> Sequence[float]:
    """Return round numbers of *unit* from 0 to *top* or just above it."""
    rough = (top or 1.0) / wanted
    whole = 1024.0 ** int(math.log(rough, 1024)) if unit == "bytes" else 1.0
    power = whole * 10.0 ** math.floor(math.log10(rough / whole))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * number for number in range(math.ceil((top or 1.0) / step - 0.001) + 1)]
