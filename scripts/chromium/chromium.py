"""Where Chromium is on this machine; installed from Debian where it is missing.

playwright's own build is not used: it comes from an archive of its own, where Debian's is signed like all the rest.
Unlike RabbitMQ it is installed and not unpacked, for it stands on a hundred libraries of the machine and starts no
service.
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
# A machine without a desktop may have no font at all, and then pages have no letters.
PACKAGES = ("chromium", "fonts-inter", "fonts-dejavu-core")
INSTALL_SECONDS = 600
# No sandbox, for root has none; nothing that calls home or waits for a graphics card.
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
    """Return Chromium: $CHROMIUM, else the machine's, else installed now by root or sudo.

    Raises ServerError with what to install.
    """
    if named := os.environ.get("CHROMIUM"):  # an explicit wish is not replaced by something else
        if not os.access(named, os.X_OK):
            raise ServerError(f"CHROMIUM: found {named}; expected the path of a program")
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
    # A fresh image has no package lists, an old one has lists of files that are gone.
    _run([*as_root, "apt-get", "update", "-q"])
    quietly = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-qy", "--no-install-recommends"]
    done = _run([*as_root, *quietly, *PACKAGES])
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise ServerError(f"Chromium could not be installed:\n{said}")


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=INSTALL_SECONDS
    )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    with Path(tempfile.gettempdir(), f"closeout-chromium-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
