"""The subreaper: a small process between this one and a server, so that the server never outlives this process.

    this process --pipe--> subreaper --fork--> server and all that it forks

It kills every process below it and exits as soon as one of these happens:

* its standard input is closed (the parent closed it or died),
* its parent changes (the parent died, but a child of the parent still holds the pipe),
* the server, the last of the commands, exits.

As a "child subreaper" (prctl(2)) it inherits the orphans of its tree, so a walk from the subreaper down finds every
process, also one that forked twice. PR_SET_PDEATHSIG on each command covers a SIGKILL of the subreaper itself. It
cannot replace the subreaper: the kernel sends that signal when the forking *thread* ends, and servers are started in
worker threads. The subreaper has one thread.

This file is run by path with ``python -I -S``, so it imports only the standard library.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_MS = 500  # delay until the death of a parent is noticed if another process still holds its pipe


def descendants(root: int) -> list[tuple[int, str]]:
    """Return (pid, state letter) of every process below *root*, parents before children."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names only, and fast: it runs in a loop
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The command's name is in brackets and may contain brackets.
            state, parent = Path(f"/proc/{entry}/stat").read_text("latin-1").rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append((int(entry), state))

    def below(pid: int) -> Iterator[tuple[int, str]]:
        for child in children.get(pid, ()):
            yield child
            yield from below(child[0])

    return list(below(root))


def dies_with(parent: int) -> Callable[[], None]:
    """Return a `preexec_fn` that makes the kernel kill the child when process *parent* dies."""
    libc = ctypes.CDLL(None, use_errno=True)

    def bind() -> None:
        # After the change of user, which clears the setting.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the prctl

    return bind


def _spawn(commands: Sequence[dict[str, Any]], log: int) -> list[subprocess.Popen[bytes]]:
    bind = dies_with(os.getpid())
    return [
        subprocess.Popen(
            command["argv"],
            env=command["env"],
            cwd=command["cwd"],
            user=command.get("user"),
            group=command.get("group"),
            extra_groups=[] if command.get("user") is not None else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is handled by the parent
            preexec_fn=bind,  # noqa: PLW1509 - the subreaper has one thread
        )
        for command in commands
    ]


def _kill_all() -> None:
    """SIGKILL and reap all processes below this one until none is left."""
    while True:
        for pid, _ in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def release_shared_memory(postmaster_pid: Path) -> None:
    """Remove the System V segment of a killed PostgreSQL, which its pid file names."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        segment = int(postmaster_pid.read_text().splitlines()[6].split()[1])
        ctypes.CDLL(None).shmctl(segment, 0, None)  # 0: IPC_RMID


def _wait(server: int, parent: int, wakeup: int) -> bool:
    """Return True if the parent has abandoned this process, False if process *server* has exited."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    while True:
        events = poll.poll(POLL_MS)
        if any(fd == sys.stdin.fileno() for fd, _ in events) or os.getppid() != parent:
            return True
        if events:
            os.read(wakeup, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if ended == server:
                    return False


def main() -> None:
    """Read one request from standard input, start its commands, print the pid of the server and wait."""
    request = json.loads(sys.stdin.readline())
    wakeup, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    abandoned = True
    try:
        # Referenced until the end: a discarded Popen reaps its child, and the exit would go unnoticed.
        processes = _spawn(request["commands"], log)
        server = processes[-1].pid
        print(server, flush=True)
        abandoned = _wait(server, request["parent"], wakeup)
    except OSError as error:
        print(error, flush=True)
    finally:
        _kill_all()
        if request["postmaster_pid"]:
            release_shared_memory(Path(request["postmaster_pid"]))
        for path in request["remove_when_abandoned"] if abandoned else ():
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
