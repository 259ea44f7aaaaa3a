"""The keeper: a small process between us and a server, so that nothing outlives us.

    we --pipe--> keeper --fork--> server, and whatever the server forks

It ends, and takes every process below it along, when any of these comes first:

* its standard input reaches its end (we closed it, or we are gone),
* its parent is another one than at the start (we are gone, but a child of ours still holds the pipe),
* the server itself, the last of the commands, has ended.

As a "child subreaper" it inherits the orphans of its tree, so the tree can be listed at any time by following
parents from the keeper: nothing escapes by forking twice. The keeper's own death by SIGKILL is covered by
PR_SET_PDEATHSIG on each command. That signal alone would not do for us: the kernel sends it when the *thread*
that forked ends, so a server started in a worker thread would die with the thread. The keeper has one thread.

This file is run by path with ``python -I -S``, so it may import nothing but the standard library.
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
POLL_MS = 500  # how late the death of a parent whose pipe is still held by someone else is noticed


def descendants(root: int) -> list[tuple[int, str]]:
    """Return (pid, state letter) of every process below *root*, parents before children."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names only, and fast: it runs in a loop
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The command's name is in brackets and may hold anything, brackets too.
            state, parent = Path(f"/proc/{entry}/stat").read_text("latin-1").rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append((int(entry), state))

    def below(pid: int) -> Iterator[tuple[int, str]]:
        for child in children.get(pid, ()):
            yield child
            yield from below(child[0])

    return list(below(root))


def dies_with(keeper: int) -> Callable[[], None]:
    """Return what a forked child does before it executes its command: bind its life to the keeper's."""
    libc = ctypes.CDLL(None, use_errno=True)

    def bind() -> None:
        # After the change of user, which clears the setting.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)  # the keeper died before the line above

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
            start_new_session=True,  # Ctrl-C in our terminal is ours to handle
            preexec_fn=bind,  # noqa: PLW1509 - the keeper has one thread
        )
        for command in commands
    ]


def _end_all() -> None:
    """SIGKILL everything below this process until nothing is left, and collect the dead."""
    while True:
        for pid, _ in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def release_shared_memory(postmaster_pid: Path) -> None:
    """Remove the System V segment that a killed PostgreSQL leaves in the kernel, named in its pid file."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        segment = int(postmaster_pid.read_text().splitlines()[6].split()[1])
        ctypes.CDLL(None).shmctl(segment, 0, None)  # 0: IPC_RMID


def _wait_for_an_end(main: int, parent: int, wakeup: int) -> bool:
    """Return True if we were abandoned, False if the process *main* has ended."""
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
                if ended == main:
                    return False


def main() -> None:
    """Read one order from standard input, print the server's pid, keep it until an end comes."""
    order = json.loads(sys.stdin.readline())
    wakeup, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    abandoned = True
    try:
        # Kept until the end: a forgotten Popen collects its child itself, and the end would go unseen.
        processes = _spawn(order["commands"], log)
        server = processes[-1].pid
        print(server, flush=True)
        abandoned = _wait_for_an_end(server, order["parent"], wakeup)
    except OSError as error:
        print(error, flush=True)
    finally:
        _end_all()
        if order["postmaster_pid"]:
            release_shared_memory(Path(order["postmaster_pid"]))
        for path in order["remove_when_abandoned"] if abandoned else ():
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
