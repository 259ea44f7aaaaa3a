"""Finds Chromium on this machine, and installs it from Debian if it is missing.

Debian's package is signed; the builds of playwright come from a separate archive. Chromium is installed and not
unpacked, because it needs a hundred libraries of the machine and starts no service.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers.process import ServerError

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A machine without a desktop may have no fonts, and then pages show no text.
PACKAGES = ("chromium", "fonts-inter", "fonts-dejavu-core")
INSTALL_SECONDS = 600
# Chromium has no sandbox for root. The others disable network traffic of its own and the graphics card.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> Path:
    """Return Chromium: $CHROMIUM, else the machine's, else installed now as root or with sudo.

    Raises ServerError with what to install.
    """
    if named := os.environ.get("CHROMIUM"):  # an explicit choice has no fallback
        if not os.access(named, os.X_OK):
            raise ServerError(f"CHROMIUM={named} is not an executable file; set it to the path of Chromium")
        return Path(named)
    with _one_at_a_time():
        found = _found()
        if found is None:
            _install()
            found = _found()
    if found is None:
        raise ServerError("Chromium is missing; set CHROMIUM to it, or as root: apt-get install chromium")
    return found


def _found() -> Path | None:
    return next((Path(path) for name in NAMES if (path := shutil.which(name))), None)


def _install() -> None:
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (as_root and not shutil.which("sudo")):
        return
    print("chromium: installing Debian's chromium, 115 MB", file=sys.stderr, flush=True)
    # A new image has no package lists, and those of an old one are out of date.
    _run([*as_root, "apt-get", "update", "-q"])
    quietly = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-qy", "--no-install-recommends"]
    done = _run([*as_root, *quietly, *PACKAGES])
    if done.returncode:
        output = "\n".join(done.stdout.splitlines()[-20:])
        raise ServerError(f"Chromium cannot be installed:\n{output}")


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=INSTALL_SECONDS
    )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    with Path(tempfile.gettempdir(), f"closeout-chromium-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
