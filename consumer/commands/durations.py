"""Ages as people write them on a command line: 90s, 5m, 2h, 1d."""

import re
from datetime import timedelta

from consumer.commands.output import EXIT_USAGE, fail

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def age(option: str, words: str) -> timedelta:
    """Return the age that *words* name, 273 years at most; end with status 2, naming *option*, if they name none."""
    found = re.fullmatch(r"(\d{1,5})([smhd])", words.strip())
    if found is None:
        fail(
            f"{option}: found {words!r}; expected a number below 100,000 with s, m, h or d, like 5m", status=EXIT_USAGE
        )
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
