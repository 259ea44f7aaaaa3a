"""Durations on the command line: 90s, 5m, 2h, 1d."""

import re
from datetime import timedelta

from consumer.commands.output import EXIT_USAGE, fail

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(option: str, text: str) -> timedelta:
    """Return the duration in *text*, 273 years at most; if it is invalid, end with status 2, naming *option*."""
    found = re.fullmatch(r"(\d{1,5})([smhd])", text.strip())
    if found is None:
        fail(f"{option}: found {text!r}; expected a number below 100,000 with s, m, h or d, like 5m", status=EXIT_USAGE)
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
