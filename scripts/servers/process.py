"""A server seen from our side: start, signal, wait; the keeper does the rest."""

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

from servers import subreaper as keeper

KEEPER_SECONDS = 30.0  # it only waits for killed processes to leave the kernel
STOPPED, GONE = "T", "ZX"  # state letters of /proc/PID/stat


class ServerError(RuntimeError):
    """A server could not be had: what is missing, or the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program for the keeper to run; *user* and *group* only when we are root."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    user: int | None = None
    group: int | None = None


class KeptProcess:
    """The last of *commands* and everything it forks, alive no longer than this process.

    May be built in any thread: only the end of the whole process counts.
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
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        order = {
            "commands": [asdict(command) for command in commands],
            "log": str(log),
            "parent": os.getpid(),
            "postmaster_pid": str(postmaster_pid) if postmaster_pid else None,
            "remove_when_abandoned": [str(path) for path in remove_when_abandoned],
        }
        assert self._keeper.stdin is not None  # noqa: S101 - both are pipes
        assert self._keeper.stdout is not None  # noqa: S101
        self._keeper.stdin.write(json.dumps(order) + "\n")
        self._keeper.stdin.flush()
        answer = self._keeper.stdout.readline().strip()
        if not answer.isdigit():
            self.kill()
            raise ServerError(f"{commands[-1].argv[0]} could not be started: {answer or 'the keeper died'}")
        self.pid = int(answer)

    @property
    def alive(self) -> bool:
        """Whether the server, or something it left behind, still runs."""
        if self._keeper.poll() is None:
            return True
        self._close()
        return False

    def send(self, number: signal.Signals) -> None:
        """Send *number* to the server's main process alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def suspend(self) -> None:
        """Stop the main process and everything below it; return once each one is stopped."""
        while running := [pid for pid, state in self._tree() if state not in STOPPED + GONE]:
            self._signal_each(running, signal.SIGSTOP)
            time.sleep(0.001)  # a process inside a system call stops when it leaves it

    def resume(self) -> None:
        """Let everything go on that `suspend` stopped."""
        self._signal_each([pid for pid, _ in self._tree()], signal.SIGCONT)

    def wait(self, seconds: float) -> bool:
        """Wait until nothing of the server is left; False if that takes longer than *seconds*."""
        try:
            self._keeper.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._close()
        return True

    def kill(self) -> None:
        """SIGKILL everything at once; return once nothing is left."""
        self._signal_each([pid for pid, _ in self._tree()], signal.SIGKILL)
        try:
            self._keeper.wait(KEEPER_SECONDS)  # it ends with the server, after it has made sure of the rest
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self._close()

    def _tree(self) -> list[tuple[int, str]]:
        return keeper.descendants(self._keeper.pid) if self.alive else []

    def _signal_each(self, pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._postmaster_pid is not None:
            keeper.release_shared_memory(self._postmaster_pid)  # in case the keeper itself was killed
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
