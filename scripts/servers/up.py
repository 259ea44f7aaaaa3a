"""The commands `up`, `down` and `status`: both servers under a supervisor in the background.

The folder holds the complete state. The supervisor holds a lock on the folder as long as it lives, so a reused pid is
never taken for it. state.json appears, complete, once both servers are ready.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from servers.binaries.rabbitmq import Version, find_rabbitmq
from servers.process import ServerError
from servers.service_pair import running_pair

STATE, PID, LOG = "state.json", "supervisor.pid", "supervisor.log"
WATCH_SECONDS = 1.0
UP_SECONDS = 900.0  # the first time includes a download
DOWN_SECONDS = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class State:
    """The version of RabbitMQ and the environment variables of running servers."""

    rabbitmq: str
    environment: dict[str, str]


def default_folder() -> Path:
    """Return this checkout's folder for this user in the system's temporary folder."""
    checkout = hashlib.sha256(__file__.encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"closeout-services-{os.getuid()}-{checkout}"


def status(folder: Path) -> State | None:
    """Return the state of the servers in *folder*, None if they are down or still starting."""
    with _lock(folder) as lock:
        return _state(folder) if lock is None else None


def up(folder: Path, version: Version, *, management: bool) -> State:
    """Start both servers unless they are running, and return their state once they are ready.

    *version* and *management* do not change servers that are already running. Raises ServerError with the log of the
    supervisor.
    """
    _claim(folder)
    with _lock(folder) as lock:
        supervisor = None
        if lock is None:
            print(f"services: already running in {folder}; options have no effect before `down`", file=sys.stderr)
        else:
            find_rabbitmq(version)  # before the supervisor does, so that the caller sees that a download is running
            for old in folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            supervisor = _start_supervisor(folder, version, lock, management=management)
    try:
        return _await_state(folder, supervisor)
    except BaseException:
        if supervisor is not None:
            supervisor.terminate()
            supervisor.wait()
        raise


def down(folder: Path) -> bool:
    """Stop the servers in *folder* and remove it; return False if it does not exist."""
    if not folder.is_dir():
        return False
    _claim(folder)
    deadline = time.monotonic() + DOWN_SECONDS
    signalled = False
    while True:
        with _lock(folder) as lock:
            if lock is not None:
                shutil.rmtree(folder)
                return True
            # The lock is held, so the pid in the file is that of the running supervisor.
            if not signalled:
                with suppress(FileNotFoundError, ValueError, ProcessLookupError):
                    os.kill(int((folder / PID).read_text()), signal.SIGTERM)
                    signalled = True
        if time.monotonic() > deadline:
            raise ServerError(f"the servers in {folder} did not stop within {DOWN_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def supervise(folder: Path, version: Version, *, management: bool) -> int:
    """Run both servers until a signal arrives or one of them exits."""
    (folder / PID).write_text(str(os.getpid()))
    with running_pair(folder / "servers", version, management=management) as (postgres, rabbit, environment):
        state = State(rabbit.full_version, environment)
        draft = folder / f"{STATE}.draft"
        draft.write_text(json.dumps(asdict(state)))
        draft.rename(folder / STATE)
        while postgres.running and rabbit.running:
            time.sleep(WATCH_SECONDS)
        for server in (postgres, rabbit):
            if not server.running:
                print(f"{server.name} exited unexpectedly:\n{server.log_tail()}", flush=True)
    return 1


def _claim(folder: Path) -> None:
    """Create *folder* if it does not exist; refuse one that another user owns or that holds other files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ServerError(f"{folder} belongs to another user")
    if any(folder.iterdir()) and not (folder / LOG).exists():
        raise ServerError(f"{folder} holds other files; use an empty or a new folder")


@contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """Try to lock *folder*: yield the descriptor that holds the lock, None if another process holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield -1  # no process can hold its lock
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield None
    else:
        yield descriptor
    finally:
        os.close(descriptor)


def _start_supervisor(folder: Path, version: Version, lock: int, *, management: bool) -> subprocess.Popen[bytes]:
    program = str(Path(__file__).with_name("__main__.py"))
    arguments = [sys.executable, program, "supervise", "--folder", str(folder), "--rabbitmq", version]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [*arguments, *(["--management"] if management else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,  # it gets neither signals nor the hangup of the terminal
            pass_fds=[lock],  # it holds the lock after this process closes the descriptor, until it exits
        )


def _await_state(folder: Path, supervisor: subprocess.Popen[bytes] | None) -> State:
    """Wait for *supervisor*, or for one that a concurrent call has started."""
    deadline = time.monotonic() + UP_SECONDS
    while (state := _state(folder)) is None:
        ended = supervisor.poll() is not None if supervisor is not None else _is_unlocked(folder)
        if ended and _state(folder) is None:
            raise ServerError(f"the servers did not start:\n{_log(folder)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the servers did not start within {UP_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    return state


def _is_unlocked(folder: Path) -> bool:
    with _lock(folder) as lock:
        return lock is not None


def _state(folder: Path) -> State | None:
    try:
        return State(**json.loads((folder / STATE).read_text()))
    except FileNotFoundError:
        return None


def _log(folder: Path) -> str:
    try:
        return (folder / LOG).read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        return "a concurrent `down` stopped them"
