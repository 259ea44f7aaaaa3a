"""A server process: start, signal, wait. The subreaper ends it with this process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from servers import subreaper

EXIT_SECONDS = 30.0  # for killed processes to leave the kernel
STOPPED, GONE = "T", "ZX"  # state letters of /proc/PID/stat


class ServerError(RuntimeError):
    """A server cannot be installed or started, or it refused a request."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program for the subreaper to run; *user* and *group* only if this process is root."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    user: int | None = None
    group: int | None = None


class ServerProcess:
    """The last of *commands* and all that it forks; they never outlive this process.

    It may be created in any thread, and outlives the thread.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        *,
        log: Path,
        remove_when_abandoned: Sequence[Path] = (),
        postmaster_pid: Path | None = None,
    ) -> None:
        self._postmaster_pid = postmaster_pid
        self._closed = False
        self._subreaper = subprocess.Popen(
            [sys.executable, "-I", "-S", subreaper.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        request = {
            "commands": [asdict(command) for command in commands],
            "log": str(log),
            "parent": os.getpid(),
            "postmaster_pid": str(postmaster_pid) if postmaster_pid else None,
            "remove_when_abandoned": [str(path) for path in remove_when_abandoned],
        }
        assert self._subreaper.stdin is not None  # noqa: S101 - both are pipes
        assert self._subreaper.stdout is not None  # noqa: S101
        self._subreaper.stdin.write(json.dumps(request) + "\n")
        self._subreaper.stdin.flush()
        reply = self._subreaper.stdout.readline().strip()
        if not reply.isdigit():
            self.kill()
            raise ServerError(f"{commands[-1].argv[0]} could not be started: {reply or 'the subreaper died'}")
        self.pid = int(reply)

    @property
    def alive(self) -> bool:
        """Whether the server, or a process that it started, still runs."""
        if self._subreaper.poll() is None:
            return True
        self._close()
        return False

    def send(self, number: signal.Signals) -> None:
        """Send *number* to the server's main process only."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def suspend(self) -> None:
        """SIGSTOP the main process and all below it; return once each is stopped."""
        while running := [pid for pid, state in self._tree() if state not in STOPPED + GONE]:
            self._signal_each(running, signal.SIGSTOP)
            time.sleep(0.001)  # a process in a system call stops only when the call returns

    def resume(self) -> None:
        """SIGCONT all processes of the server."""
        self._signal_each([pid for pid, _ in self._tree()], signal.SIGCONT)

    def wait(self, seconds: float) -> bool:
        """Wait until no process of the server is left; return False if that takes longer than *seconds*."""
        try:
            self._subreaper.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._close()
        return True

    def kill(self) -> None:
        """SIGKILL all processes of the server; return once none is left."""
        self._signal_each([pid for pid, _ in self._tree()], signal.SIGKILL)
        try:
            self._subreaper.wait(EXIT_SECONDS)  # it exits after the server and all its processes
        except subprocess.TimeoutExpired:
            self._subreaper.kill()
            self._subreaper.wait()
        self._close()

    def _tree(self) -> list[tuple[int, str]]:
        return subreaper.descendants(self._subreaper.pid) if self.alive else []

    def _signal_each(self, pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._postmaster_pid is not None:
            subreaper.release_shared_memory(self._postmaster_pid)  # if the subreaper was killed
        for pipe in (self._subreaper.stdin, self._subreaper.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
