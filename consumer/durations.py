"""Lengths of time for people."""


def spoken(seconds: float) -> str:
    """Return *seconds* as a person says it, in the largest unit that keeps two digits: 12 s, 90 s, 75 min, 3 d."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
