"""The command `run`: runs another command while both servers are up."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from servers.binaries.rabbitmq import Version
from servers.service_pair import ENDING, running_pair
from servers.subreaper import dies_with

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as in shells


def run(command: Sequence[str], version: Version, *, management: bool) -> int:
    """Run *command* with the addresses of the servers in its environment and return its exit status."""
    folder = Path(tempfile.mkdtemp(prefix="closeout-run-"))
    with running_pair(folder, version, management=management) as (_, _, environment):
        return wait_for(command, {**os.environ, **environment})


def wait_for(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run *command*, pass signals on to it, and return its exit status."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that arrive before the command has started

    def pass_on(number: int, _: FrameType | None = None) -> None:
        if child is None:
            early.append(number)
        # The terminal has sent Ctrl-C to the command already: it signals the whole foreground process group.
        elif number != signal.SIGINT or not _in_foreground():
            child.send_signal(number)

    before = [(number, signal.signal(number, pass_on)) for number in ENDING]
    try:
        # Without dies_with, the command would continue without servers if this process were killed.
        child = subprocess.Popen(command, env=environment, preexec_fn=dies_with(os.getpid()))  # noqa: PLW1509
        for number in early:
            pass_on(number)
        status = child.wait()
    except OSError as error:
        print(f"services: {command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _in_foreground() -> bool:
    try:
        with Path("/dev/tty").open("rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
