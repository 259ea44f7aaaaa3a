"""A process that has imported what ``closeout`` imports, and forks for each command.

A command then starts in milliseconds, as a process with its own arguments, environment and standard streams. The
acceptance tests start the installed command itself.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import coverage

# Seconds. Ends a test whose command hangs; a busy machine must not exceed it.
TIMEOUT = 100.0
# Modules that read the environment when they are imported: each command imports them itself.
_NOT_PRELOADED = ("consumer.cli", "consumer.commands")
_LIBRARIES = ("alembic.command", "aio_pika", "rich.table", "rich.progress", "sqlalchemy.dialects.postgresql.asyncpg")
_STARTING = threading.Lock()
_ROOT = Path(__file__).parents[2]
# Names the data file of a test run that measures coverage.
_DATA_FILE = "CLOSEOUT_TESTS_COVERAGE"


class Fork:
    """One command, from its start to its exit status."""

    def __init__(self, arguments: Sequence[str], *, env: dict[str, str], streams: tuple[int, int, int]) -> None:
        with _STARTING:
            address = _start()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(TIMEOUT)
        self._connection.connect(address)
        socket.send_fds(self._connection, [b"\n"], list(streams))
        self._answers = self._connection.makefile("rw", encoding="utf-8")
        self._answers.write(json.dumps([list(arguments), env]) + "\n")
        self._answers.flush()
        self._pid = int(self._answers.readline())

    def wait(self) -> int:
        """Wait for the command's end and return its exit status; kill it after TIMEOUT."""
        try:
            return int(self._answers.readline())
        except TimeoutError:
            os.kill(self._pid, signal.SIGKILL)
            raise
        finally:
            self._answers.close()
            self._connection.close()


@functools.cache
def _start() -> str:
    measuring = coverage.Coverage.current()
    environ = os.environ | ({_DATA_FILE: measuring.config.data_file} if measuring else {})
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=_ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    name = process.stdout.readline().strip()
    assert name, "the process that forks commands did not start"
    atexit.register(process.communicate)
    return f"\0{name}"


def _serve() -> None:
    """Fork for each connection until standard input ends."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    consumer = importlib.import_module("consumer")
    for found in pkgutil.walk_packages(consumer.__path__, "consumer."):
        if not found.name.startswith(_NOT_PRELOADED):
            importlib.import_module(found.name)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        address = f"closeout-tests-{os.getpid()}"
        listener.bind("\0" + address)
        listener.listen()
        print(address, flush=True)  # noqa: T201 - the parent reads it
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _supervise(connection)
                return
            connection.close()


def _supervise(connection: socket.socket) -> None:
    """Fork the command of *connection*, and report its process id and its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    streams = socket.recv_fds(connection, 1, 3)[1]
    with connection, connection.makefile("rw", encoding="utf-8") as file:
        arguments, env = json.loads(file.readline())
        child = os.fork()
        if child:
            for stream in streams:
                os.close(stream)
            file.write(f"{child}\n")
            file.flush()
            file.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
            file.flush()
            os._exit(0)
    _become(arguments, env, streams)


def _become(arguments: list[str], env: dict[str, str], streams: Sequence[int]) -> None:
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    data_file = os.environ.get(_DATA_FILE)
    os.environ.clear()
    os.environ.update(env)
    if data_file:
        _measure(data_file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - until the process ends, as are the others
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.argv = ["closeout", *arguments]
    importlib.import_module("consumer.cli").main()


def _measure(data_file: str) -> None:
    """Write the lines that this process runs next to *data_file*, from where the test run combines them."""
    measuring = coverage.Coverage(data_file, data_suffix=True, config_file=str(_ROOT / "pyproject.toml"))
    measuring.start()
    atexit.register(measuring.save)


if __name__ == "__main__":
    _serve()
