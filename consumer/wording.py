"""Counts for people."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return *number* with its noun: 1 run, 2,000 runs; *many* is the plural where it is not *one* with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
