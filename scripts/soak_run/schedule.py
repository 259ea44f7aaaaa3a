"""The schedule of faults, derived from the seed and the duration alone, so that a soak can be repeated."""

import random
from typing import Literal, NamedTuple

Target = Literal["worker", "rabbitmq", "postgresql"]
Kind = Literal["kill", "term", "suspend", "disconnect", "alarm"]

# Faults of every minute: 40 worker kills and 10 to 20 restarts of each server in ten minutes.
EVERY_MINUTE: tuple[tuple[Kind, Target], ...] = (
    *((("kill", "worker"),) * 4),
    ("term", "worker"),
    ("suspend", "worker"),
    ("kill", "rabbitmq"),
    ("kill", "postgresql"),
    ("disconnect", "postgresql"),
)
# One of these is added per minute.
SOMETIMES: tuple[tuple[Kind, Target], ...] = (
    ("suspend", "rabbitmq"),
    ("suspend", "postgresql"),
    ("alarm", "rabbitmq"),
    ("kill", "rabbitmq"),
    ("kill", "postgresql"),
)
QUIET_SECONDS = 5.0  # without a fault at the start, while the workers start


class Fault(NamedTuple):
    """A fault to inject into one target *at* seconds after the start.

    The target stays suspended, blocked or down for *seconds*.
    """

    at: float
    kind: Kind
    target: Target
    number: int  # of the worker, or of the node of a cluster
    seconds: float

    def __str__(self) -> str:
        """Return one line."""
        target = self.target if self.target == "rabbitmq" else f"{self.target} {self.number}"
        duration = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.at:6.1f} s  {self.kind} {target}{duration}"


def schedule(*, seconds: float, seed: int, workers: int) -> list[Fault]:
    """Return the faults of a soak of *seconds*, ordered by time.

    Worker 0 is never killed or stopped, so that its memory can be measured over the soak.
    """
    source = random.Random(seed)  # noqa: S311 - repeatable, not secret
    faults: list[Fault] = []
    start = QUIET_SECONDS
    while start < seconds:
        span = min(60.0, seconds - start)
        kinds = [*EVERY_MINUTE, source.choice(SOMETIMES)]
        source.shuffle(kinds)
        for kind, target in kinds[: max(1, round(len(kinds) * span / 60))]:
            first = 1 if kind in {"kill", "term"} and workers > 1 else 0
            worker = source.randrange(first, workers)
            faults.append(Fault(start + source.uniform(0, span), kind, target, worker, _duration(source, kind, target)))
        start += 60.0
    return sorted(faults)


def _duration(source: random.Random, kind: Kind, target: Target) -> float:
    if kind == "suspend":
        return source.uniform(1, 12)
    if kind == "alarm":
        return source.uniform(2, 8)
    if kind == "kill" and target != "worker":
        return source.uniform(0, 3)
    return 0.0
