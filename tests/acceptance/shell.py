"""Runs ``closeout`` in a terminal of 80 columns, without the time that its imports take.

A server process imports everything once and forks for each command.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS, LINES = 80, 50
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Output(NamedTuple):
    """The exit status of a command, its standard output and its standard error."""

    status: int
    text: str


class Shell:
    """A shell in *folder* with *environ*."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env={**environ, "NO_COLOR": "1", "TERM": "xterm-256color"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def closeout(self, *words: str, urls: Mapping[str, str]) -> Output:
        """Run the command with *urls* in its environment and return its output."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([words, urls]) + "\n")
        self._process.stdin.flush()
        return Output(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process that forks."""
        self._process.communicate(timeout=30)


def _serve() -> None:
    import gc
    import pkgutil
    import threading

    from rich.console import Console

    import consumer
    from consumer.commands import output

    # As in a terminal, but without progress bars in the output.
    output.out = Console(highlight=False, width=COLUMNS, force_terminal=True, color_system=None)
    output.err = Console(stderr=True, highlight=False, force_terminal=False)
    for module in ("sqlalchemy.dialects.postgresql.asyncpg", "alembic.command", "aio_pika"):
        importlib.import_module(module)
    for found in pkgutil.walk_packages(consumer.__path__, "consumer."):
        importlib.import_module(found.name)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    gc.freeze()
    with os.fdopen(os.dup(1), "w") as results:
        for line in sys.stdin:
            results.write(json.dumps(_run(*json.loads(line))) + "\n")
            results.flush()


def _run(words: list[str], urls: dict[str, str]) -> tuple[int, str]:
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    child = os.fork()
    if child == 0:
        os.environ.update(urls)
        _become(words, theirs)
    os.close(theirs)
    written = b""
    while part := _read(ours):
        written += part
    os.close(ours)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, _ESCAPES.sub("", written.decode()).replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # EIO: the other end is closed
        return b""


def _become(words: list[str], terminal: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.close(terminal)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["closeout", *words]
    status: Any = 0
    try:
        from consumer.cli import main

        main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001 - nothing may return into the process that forks
        import traceback

        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
