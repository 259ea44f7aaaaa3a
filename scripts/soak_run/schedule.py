"""Which fault comes when: derived from the seed and the length alone, so that a run can be had again."""

import random
from typing import Literal, NamedTuple

Target = Literal["worker", "rabbitmq", "postgresql"]
Kind = Literal["kill", "term", "suspend", "disconnect", "alarm"]

# What every minute holds. Ten minutes make 40 worker kills and 10 to 20 restarts of either server.
EVERY_MINUTE: tuple[tuple[Kind, Target], ...] = (
    *((("kill", "worker"),) * 4),
    ("term", "worker"),
    ("suspend", "worker"),
    ("kill", "rabbitmq"),
    ("kill", "postgresql"),
    ("disconnect", "postgresql"),
)
# One of these a minute on top.
SOMETIMES: tuple[tuple[Kind, Target], ...] = (
    ("suspend", "rabbitmq"),
    ("suspend", "postgresql"),
    ("alarm", "rabbitmq"),
    ("kill", "rabbitmq"),
    ("kill", "postgresql"),
)
# Seconds without a fault at the beginning, for the workers to start.
QUIET_SECONDS = 5.0


class Fault(NamedTuple):
    """One thing done to one target; *seconds* is how long it stays suspended, blocked or down."""

    at: float
    kind: Kind
    target: Target
    worker: int
    seconds: float

    def __str__(self) -> str:
        """Say it in a line."""
        target = f"worker {self.worker}" if self.target == "worker" else self.target
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.at:6.1f} s  {self.kind} {target}{lasting}"


def schedule(*, seconds: float, seed: int, workers: int) -> list[Fault]:
    """Return the faults of a run that lasts *seconds*, in order.

    Worker 0 is spared kill and term, so that one process lives through everything and its memory can be watched.
    """
    source = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    faults: list[Fault] = []
    start = QUIET_SECONDS
    while start < seconds:
        span = min(60.0, seconds - start)
        kinds = [*EVERY_MINUTE, source.choice(SOMETIMES)]
        source.shuffle(kinds)
        for kind, target in kinds[: max(1, round(len(kinds) * span / 60))]:
            spared = 1 if kind in {"kill", "term"} and workers > 1 else 0
            worker = source.randrange(spared, workers)
            faults.append(Fault(start + source.uniform(0, span), kind, target, worker, _lasting(source, kind, target)))
        start += 60.0
    return sorted(faults)


def _lasting(source: random.Random, kind: Kind, target: Target) -> float:
    if kind == "suspend":
        return source.uniform(1, 12)
    if kind == "alarm":
        return source.uniform(2, 8)
    if kind == "kill" and target != "worker":
        return source.uniform(0, 3)
    return 0.0
