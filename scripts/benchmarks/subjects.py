"""The compared subjects: their commands and the sizes of their backlogs."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.arena import CELERY_QUEUE

PYTHON = sys.executable


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A command that closes out runs. *runs* is the size of its backlog: some seconds of work."""

    name: str
    argv: tuple[str, ...]
    runs: int
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    queue: str = "closeout.run-completed"


def closeout(name: str = "Closeout", *, runs: int = 12_000, processes: int = 1, **settings: str) -> Subject:
    """Return Closeout with *settings* added to its defaults."""
    command = os.path.join(os.path.dirname(PYTHON), "closeout")  # noqa: PTH118, PTH120 - not resolved: the one of this environment
    environment = {
        "TRANSACTION_COORDINATOR_ENABLED": "true",
        "HTTP_HOST": "127.0.0.1",
        "HTTP_PORT": "0",
        "LOG_LEVEL": "INFO",
        **settings,
    }
    return Subject(name=name, argv=(command, "worker"), runs=runs, processes=processes, environment=environment)


def peer(name: str, module: str, *, runs: int, processes: int = 1, queue: str = "closeout.run-completed") -> Subject:
    """Return a peer: a module of :mod:`benchmarks.peers`."""
    argv = (PYTHON, "-m", f"benchmarks.peers.{module}", "worker")
    return Subject(name=name, argv=argv, runs=runs, processes=processes, queue=queue)


THROUGHPUT = (
    closeout(),
    closeout("Closeout, 2 workers", processes=2),
    peer("FastStream + SQLAlchemy ORM", "faststream_orm", runs=1_500),
    peer("FastStream + SQLAlchemy ORM, 2 workers", "faststream_orm", runs=2_000, processes=2),
    peer("aio-pika + SQLAlchemy Core", "core", runs=1_500),
    peer("Celery + SQLAlchemy ORM, 8 processes", "celery_orm", runs=2_000, queue=CELERY_QUEUE),
)
