"""The workers: ``closeout worker`` processes that are killed and started again, and watched meanwhile."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
# Seconds that a worker may take to end after SIGTERM: its grace period of 25, and some for a busy machine.
TERM_SECONDS = 40.0
SAMPLE_SECONDS = 1.0
MEBIBYTE = 1024 * 1024


@dataclass(slots=True)
class Member:
    """One place in the fleet, and the process that fills it now."""

    number: int
    process: "subprocess.Popen[bytes]"
    since: float
    ending: bool = False  # we told it to end, so its end is no surprise


@dataclass(slots=True)
class Fleet:
    """All workers of a soak."""

    size: int
    environment: dict[str, str]
    logs: Path
    members: list[Member] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds of worker 0's life, bytes
    starts: int = 0

    def start(self) -> None:
        """Start all of them."""
        self.members = [Member(number, self._spawn(number), time.monotonic()) for number in range(self.size)]

    def _spawn(self, number: int) -> "subprocess.Popen[bytes]":
        # With setpriv the worker dies with us even if we are killed; without it only an orderly end takes it down.
        leash = [setpriv, "--pdeathsig", "KILL", "--"] if (setpriv := shutil.which("setpriv")) else []
        self.starts += 1
        with (self.logs / f"worker-{number}.log").open("ab") as log:
            return subprocess.Popen(
                [*leash, CLOSEOUT, "worker"],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def kill(self, number: int) -> None:
        """SIGKILL a worker and start another in its place."""
        member = self.members[number]
        member.ending = True
        member.process.kill()
        await asyncio.to_thread(member.process.wait)
        self._replace(number)

    async def term(self, number: int) -> None:
        """Tell a worker to stop; it must exit 0 in time. Then start another in its place."""
        member = self.members[number]
        if not member.ending:
            await self._ended(member)
            self._replace(number)

    async def suspend(self, number: int, seconds: float) -> None:
        """Stop a worker's process, and let it go on after *seconds*, if it is still there."""
        member = self.members[number]
        member.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        member.process.send_signal(signal.SIGCONT)
        member.since += seconds  # it has not grown older

    async def stop(self) -> None:
        """Tell all to stop, and wait until they have."""
        await asyncio.gather(*(self._ended(member) for member in self.members))

    async def _ended(self, member: Member) -> None:
        member.ending = True
        started = time.monotonic()
        member.process.send_signal(signal.SIGCONT)
        member.process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.to_thread(member.process.wait, TERM_SECONDS)
        except subprocess.TimeoutExpired:
            self.faults.append(f"worker {member.number} did not end within {TERM_SECONDS:.0f} s of SIGTERM")
            member.process.kill()
            return
        killed_meanwhile = status == -signal.SIGKILL
        young = started - member.since < 3  # it had not set its signal handlers yet
        if status and not killed_meanwhile and not (young and status == -signal.SIGTERM):
            self.faults.append(f"worker {member.number} exited {status} after SIGTERM")

    def _replace(self, number: int) -> None:
        if number == 0:
            self.memory.clear()  # it should have lived; a new process starts small
        self.members[number] = Member(number, self._spawn(number), time.monotonic())

    async def watch(self) -> None:
        """Note worker 0's memory and every worker that ends by itself, and start that again; until cancelled."""
        while True:
            for member in self.members:
                status = member.process.poll()
                if status is not None and not member.ending:
                    self.faults.append(f"worker {member.number} ended by itself with {status}")
                    self._replace(member.number)
            first = self.members[0]
            with suppress(OSError, ValueError, IndexError):
                self.memory.append((time.monotonic() - first.since, _resident(first.process.pid)))
            await asyncio.sleep(SAMPLE_SECONDS)

    def end(self) -> None:
        """Leave nothing running."""
        for member in self.members:
            if member.process.poll() is None:
                member.process.kill()
                member.process.wait()

    def complaints(self) -> Counter[str]:
        """Return what the workers logged as errors, and what their tracebacks end with, counted."""
        found: Counter[str] = Counter()
        for log in sorted(self.logs.glob("worker-*.log")):
            for line in log.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    # Of a traceback the line that says what it was; exception groups indent it behind bars.
                    if error := re.match(r"[\s|]*((?:\w+\.)*\w+(?:Error|Exception|Warning): .*)", line):
                        found[re.sub(r"0x[0-9a-f]+", "0x", error[1])[:160]] += 1
                    continue
                if entry.get("level") in {"error", "critical", "exception"}:
                    found[str(entry.get("event"))[:200]] += 1
        return found


def _resident(pid: int) -> int:
    """Return the bytes of memory that the process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
