"""A container without an engine: the image's root read-only, its user without rights, Python as process 1."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaging.dockerfile import Stage

_DEVICES = ("null", "zero", "urandom", "random")
_SECRETS = "run/secrets/closeout"


class ProofError(Exception):
    """What ran was not what it should be; the text says how."""


@dataclass(frozen=True, slots=True)
class Image:
    """The root of a last stage, and what the stage says about it."""

    root: Path
    stage: Stage

    @property
    def user(self) -> tuple[str, str]:
        """Return the user's and the group's number."""
        user, _, group = self.stage.last("USER").rest.partition(":")
        return user, group

    def give_secrets(self, files: Mapping[str, str]) -> None:
        """Write *files* as a kubelet mounts a secret with ``fsGroup`` and mode 0440."""
        folder = self.root / _SECRETS
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in files.items():
            file = folder / name
            file.write_text(content)
            os.chown(file, 0, int(self.user[1]))
            file.chmod(0o440)

    def start(self, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """Start the image's ENTRYPOINT with *arguments*; its standard error goes to *log*."""
        root, (user, group) = shlex.quote(str(self.root)), self.user
        for name in _DEVICES:
            (self.root / "dev" / name).touch()
        mounts = [f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}"]
        mounts += [f"mount --bind /dev/{name} {root}/dev/{name}" for name in _DEVICES]
        inside = f"unshare --pid --fork --kill-child --root {root} --mount-proc --setuid {user} --setgid {group}"
        command = shlex.join([*self.stage.last("ENTRYPOINT").words, *arguments])
        script = " && ".join([*mounts, f"exec setpriv --no-new-privs {inside} {command}"])
        own = dict(
            word.split("=", 1) for found in self.stage.instructions if found.name == "ENV" for word in found.words
        )
        with log.open("wb") as file:
            return subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **own, **environ},
                stdout=file,
                stderr=file,
            )

    def run(self, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> str:
        """Run to the end, which must be status 0; return what was said."""
        process = self.start(arguments, environ, log)
        status = process.wait(120)
        if status:
            raise ProofError(f"{' '.join(arguments)} ended with {status}:\n{log.read_text()}")
        return log.read_text().strip()


def first_process(process: "subprocess.Popen[bytes]") -> int:
    """Return the pid, as this machine sees it, of the container's process 1."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: bool(children.read_text()), "the container has no process")
    return int(children.read_text().split()[0])


def status_of(pid: int) -> dict[str, str]:
    """Return what /proc says of *pid*."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def http_state(port: int, path: str) -> Any:  # noqa: ANN401 - JSON
    """Return what the worker answers, None while it does not."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            body = answer.read().decode()
    except OSError:
        return None
    return json.loads(body) if body.startswith("{") else body


def until(condition: Any, complaint: str, *, within: float = 60.0) -> None:  # noqa: ANN401 - any callable
    """Return once *condition* holds; raise :class:`ProofError` with *complaint* if it does not in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise ProofError(complaint)
        time.sleep(0.05)


def stop(process: "subprocess.Popen[bytes]", pid: int, *signals: signal.Signals) -> tuple[int, float]:
    """Send *signals* to the container's process 1 as an engine does; return its exit status and the seconds it took."""
    began = time.monotonic()
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.2)
    return process.wait(60), time.monotonic() - began
