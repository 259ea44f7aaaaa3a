"""Starts, kills, restarts and monitors ``closeout worker`` processes."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from demo_run.setup import CLOSEOUT

TERM_SECONDS = 40.0  # to exit after SIGTERM: the grace period of 25, and a reserve for a busy machine
SAMPLE_SECONDS = 1.0
MEBIBYTE = 1024 * 1024


@dataclass(slots=True)
class Worker:
    """A numbered worker and its current process."""

    number: int
    process: "subprocess.Popen[bytes]"
    started: float
    stopping: bool = False  # the soak ended the process, so its exit is expected


@dataclass(slots=True)
class WorkerProcesses:
    """All workers of a soak."""

    size: int
    environment: dict[str, str]
    logs: Path
    workers: list[Worker] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes of worker 0, one sample per second
    starts: int = 0

    def start(self) -> None:
        """Start all workers."""
        self.workers = [Worker(number, self._spawn(number), time.monotonic()) for number in range(self.size)]

    def _spawn(self, number: int) -> "subprocess.Popen[bytes]":
        # With setpriv a worker is killed even if this process is killed.
        wrapper = [setpriv, "--pdeathsig", "KILL", "--"] if (setpriv := shutil.which("setpriv")) else []
        self.starts += 1
        with (self.logs / f"worker-{number}.log").open("ab") as log:
            return subprocess.Popen(
                [*wrapper, CLOSEOUT, "worker"],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def kill(self, number: int) -> None:
        """Kill a worker and start a replacement."""
        worker = self.workers[number]
        worker.stopping = True
        worker.process.kill()
        await asyncio.to_thread(worker.process.wait)
        self._replace(number)

    async def term(self, number: int) -> None:
        """Stop a worker with SIGTERM, require exit status 0 in time, and start a replacement."""
        worker = self.workers[number]
        if not worker.stopping:
            await self._terminate(worker)
            self._replace(number)

    async def suspend(self, number: int, seconds: float) -> None:
        """Suspend a worker's process for *seconds*."""
        worker = self.workers[number]
        worker.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        worker.process.send_signal(signal.SIGCONT)
        worker.started += seconds

    async def stop(self) -> None:
        """Stop all workers with SIGTERM and wait for them."""
        await asyncio.gather(*(self._terminate(worker) for worker in self.workers))

    async def _terminate(self, worker: Worker) -> None:
        worker.stopping = True
        started = time.monotonic()
        worker.process.send_signal(signal.SIGCONT)
        worker.process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.to_thread(worker.process.wait, TERM_SECONDS)
        except subprocess.TimeoutExpired:
            self.faults.append(f"worker {worker.number} did not exit within {TERM_SECONDS:.0f} s of SIGTERM")
            worker.process.kill()
            return
        killed_meanwhile = status == -signal.SIGKILL
        starting = started - worker.started < 3  # its signal handlers may not be set yet
        if status and not killed_meanwhile and not (starting and status == -signal.SIGTERM):
            self.faults.append(f"worker {worker.number} exited {status} after SIGTERM")

    def _replace(self, number: int) -> None:
        if number == 0:
            self.memory.clear()  # a new process starts with less memory
        self.workers[number] = Worker(number, self._spawn(number), time.monotonic())

    async def watch(self) -> None:
        """Sample worker 0's memory, and report and replace workers that exit unexpectedly; until cancelled."""
        while True:
            for worker in self.workers:
                status = worker.process.poll()
                if status is not None and not worker.stopping:
                    self.faults.append(f"worker {worker.number} exited unexpectedly with status {status}")
                    self._replace(worker.number)
            with suppress(OSError, ValueError, IndexError):
                self.memory.append(_resident_bytes(self.workers[0].process.pid))
            await asyncio.sleep(SAMPLE_SECONDS)

    def kill_all(self) -> None:
        """Kill all remaining processes."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()

    def logged_errors(self) -> Counter[str]:
        """Return how often each error event and each traceback's last line was logged."""
        found: Counter[str] = Counter()
        for log in sorted(self.logs.glob("worker-*.log")):
            for line in log.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    # The last line of a traceback; exception groups indent it behind bars.
                    if error := re.match(r"[\s|]*((?:\w+\.)*\w+(?:Error|Exception|Warning): .*)", line):
                        found[re.sub(r"0x[0-9a-f]+", "0x", error[1])[:160]] += 1
                    continue
                if entry.get("level") in {"error", "critical", "exception"}:
                    found[str(entry.get("event"))[:200]] += 1
        return found


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
