"""Counts and durations as text for people, and reports of progress."""

from collections.abc import Callable

# Called with how many are done, and how many there are.
Progress = Callable[[int, int], None]


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return *number* with its noun: 1 run, 2,000 runs; *many* is an irregular plural."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def format_seconds(seconds: float) -> str:
    """Return *seconds* in the largest unit that keeps two digits: 12 s, 90 s, 75 min, 3 d."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
