"""The installed ``closeout`` as a process: in a pipe, as scripts see it, and on a terminal, as users run it.

URLs of an administrator are replaced with those of an operator, so that tests also show that its privileges are
sufficient.
"""

import asyncio
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from tests.support.command_server import TIMEOUT, Fork
from tests.support.roles import OPERATOR, OPERATOR_USER, as_role, as_user

CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
Done = subprocess.CompletedProcess[str]


def _environment(command: str, environ: dict[str, str]) -> dict[str, str]:
    if command != "doctor":  # it also reports on an administrator's rights
        environ = environ | {
            name: change(environ[name], who)
            for name, change, who in (("DATABASE_URL", as_role, OPERATOR), ("AMQP_URL", as_user, OPERATOR_USER))
            if name in environ
        }
    kept = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "AMQP_URL"}}
    return {**kept, "NO_COLOR": "1", "LOG_LEVEL": "ERROR", **environ}


def run(*arguments: str, env: dict[str, str], stdin: str = "") -> Done:
    """Run the installed command in a pipe with *env* as its only environment, and return its output."""
    return subprocess.run(
        [CLOSEOUT, *arguments], env=env, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def closeout_blocking(*arguments: str, **environ: str) -> Done:
    """Like :func:`closeout`, for a test without an event loop."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open() as nothing:
        streams = (nothing.fileno(), out.fileno(), err.fileno())
        status = Fork(arguments, env=_environment(arguments[0], environ), streams=streams).wait()
        written = []
        for file in (out, err):
            file.seek(0)
            written.append(file.read().decode())
    return Done(["closeout", *arguments], status, *written)


async def closeout(*arguments: str, **environ: str) -> Done:
    """Run the command in a pipe, without blocking the event loop, and return its output."""
    return await asyncio.to_thread(closeout_blocking, *arguments, **environ)


async def on_a_terminal(*arguments: str, columns: int = 80, colour: bool = False, **environ: str) -> tuple[int, str]:
    """Run the command on a terminal of *columns*; return its exit status and output."""
    return await asyncio.to_thread(_on_a_terminal, arguments, columns, colour=colour, environ=environ)


def _on_a_terminal(
    arguments: tuple[str, ...], columns: int, *, colour: bool, environ: dict[str, str]
) -> tuple[int, str]:
    environment = {**_environment(arguments[0], environ), "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    if colour:
        del environment["NO_COLOR"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = Fork(arguments, env=environment, streams=(theirs, theirs, theirs))
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode().replace("\r\n", "\n")


def plain(written: str) -> str:
    """Return *written* without a terminal's escape sequences."""
    return _ESCAPES.sub("", written)
