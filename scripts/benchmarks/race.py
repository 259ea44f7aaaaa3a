"""One lap: publishes a backlog, runs one subject on it, and measures its rate and cost."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from servers.process import ServerError

from benchmarks.arena import CELERY_QUEUE, Arena, Reading
from benchmarks.messages import bodies, fill
from benchmarks.subjects import PYTHON, Subject

DEADLINE_SECONDS = 180.0  # to process a backlog; the slowest peer takes 15
WARM_UP = 0.2  # share of a backlog that is not measured: connections, prepared statements, caches
POLL_SECONDS = 0.2


class Lap(NamedTuple):
    """Runs per second, and costs per run."""

    rate: float
    cost: dict[str, float]


def lap(arena: Arena, subject: Subject, seed: int, logs: Path, *, keep: bool = False) -> Lap:
    """Let *subject* process its backlog alone on the machine; with *keep*, stored runs stay in the database."""
    arena.empty(keep=keep)
    backlog(arena, subject, bodies(subject.runs, seed))
    skip = int(subject.runs * WARM_UP)
    with running(subject, arena.environment, logs) as processes:
        pids = [process.pid for process in processes]
        until_finished(arena, processes, skip)
        before = arena.reading(pids)
        until_finished(arena, processes, subject.runs)
        after = arena.reading(pids)
    return Lap(arena.rate(skip), costs(before, after))


def backlog(arena: Arena, subject: Subject, messages: Sequence[bytes]) -> None:
    """Publish *messages* to the queue that *subject* consumes."""
    if subject.queue != CELERY_QUEUE:
        asyncio.run(fill(arena.environment["AMQP_URL"], messages))
        return
    with tempfile.NamedTemporaryFile() as lines:
        lines.write(b"\n".join(messages))
        lines.flush()
        _checked([PYTHON, "-m", "benchmarks.peers.celery_orm", "fill", lines.name], arena.environment)


def costs(before: Reading, after: Reading) -> dict[str, float]:
    """Return the cost per run between two readings."""
    runs = max(1, after.runs - before.runs)
    return {
        "statements": (after.statements - before.statements) / runs,
        "transactions": (after.transactions - before.transactions) / runs,
        "WAL bytes": (after.wal_bytes - before.wal_bytes) / runs,
        **{f"{who} CPU ms": 1000 * (after.cpu[who] - before.cpu[who]) / runs for who in before.cpu},
        "busy cores": sum(after.cpu[who] - before.cpu[who] for who in before.cpu) / (after.at - before.at),
    }


@contextmanager
def running(subject: Subject, environment: dict[str, str], logs: Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Run *subject*'s processes and stop them at the end."""
    log = logs / f"{subject.name.replace(' ', '-').replace(',', '')}.log"
    with log.open("ab") as out:
        processes = [
            subprocess.Popen(
                subject.argv, env={**os.environ, **environment, **subject.environment}, stdout=out, stderr=out
            )
            for _ in range(subject.processes)
        ]
    try:
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until_finished(arena: Arena, processes: Sequence["subprocess.Popen[bytes]"], runs: int) -> None:
    """Return when *runs* runs of this round have all events confirmed; raise ServerError at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (finished := arena.finished_runs()) < runs:
        if any(process.poll() is not None for process in processes):
            raise ServerError(f"a process exited: {processes[0].args!r}")
        if time.monotonic() > deadline:
            raise ServerError(f"{finished} of {runs} runs after {DEADLINE_SECONDS:.0f} s: {processes[0].args!r}")
        time.sleep(POLL_SECONDS)


def _checked(argv: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise ServerError(f"{argv}: exit {done.returncode}")
