"""The installed ``closeout`` as a process: in a pipe, as scripts see it, and on a terminal, as people do.

Where a test's URLs are an administrator's it runs as an operator, whose rights must do for what operators do.
"""

import asyncio
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.support.roles import OPERATOR, OPERATOR_USER, as_role, as_user

CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
Done = subprocess.CompletedProcess[str]


def _environment(command: str, environ: dict[str, str]) -> dict[str, str]:
    if command != "doctor":  # which says what it finds of an administrator, too
        environ = environ | {
            name: change(environ[name], who)
            for name, change, who in (("DATABASE_URL", as_role, OPERATOR), ("AMQP_URL", as_user, OPERATOR_USER))
            if name in environ
        }
    kept = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "AMQP_URL"}}
    return {**kept, "NO_COLOR": "1", "LOG_LEVEL": "ERROR", **environ}


async def closeout(*arguments: str, **environ: str) -> Done:
    """Run the command in a pipe and return what it said; the loop goes on meanwhile."""
    return await asyncio.to_thread(
        subprocess.run,
        [CLOSEOUT, *arguments],
        env=_environment(arguments[0], environ),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        stdin=subprocess.DEVNULL,
    )


async def on_a_terminal(*arguments: str, columns: int = 80, colour: bool = False, **environ: str) -> tuple[int, str]:
    """Run the command on a terminal so wide; return its status and all that it wrote there."""
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
    process = subprocess.Popen(
        [CLOSEOUT, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
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
    return process.wait(30), written.decode().replace("\r\n", "\n")


def plain(written: str) -> str:
    """Return what was *written* without a terminal's escapes."""
    return _ESCAPES.sub("", written)
