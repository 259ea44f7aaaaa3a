"""Prometheus and promtool, unpacked into a cache folder; nothing is installed on the machine, no service is started.

Both are Go programs that need no other library than a C library of 2.34 or newer, so they are used as they come.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from servers.binaries.apt import PrivateApt, unpack
from servers.binaries.cache import cache_folder, locked
from servers.process import ServerError

RELEASE, LINE = "bookworm", "2"  # Debian 12 has 2.42; rules are tested on one line only, 3 counts ranges differently
RECIPE = 1  # raise it when what is unpacked differs: old caches are not used any more


@dataclass(frozen=True)
class Prometheus:
    """The two programs in *folder*."""

    folder: Path

    @property
    def server(self) -> Path:
        """Return the server's program."""
        return self.folder / "prometheus"

    @property
    def promtool(self) -> Path:
        """Return the program that checks rules and metrics."""
        return self.folder / "promtool"

    @property
    def version(self) -> str:
        """Return promtool's version, empty where it does not run."""
        try:
            done = subprocess.run([self.promtool, "--version"], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        words = f"{done.stdout}{done.stderr}".split()  # "promtool, version 2.42.0+ds (branch: ..."
        return words[2] if done.returncode == 0 and len(words) > 2 else ""

    @property
    def is_usable(self) -> bool:
        """Tell whether both are there, and of the line that the rules are tested on."""
        return self.server.exists() and self.version.startswith(f"{LINE}.")


def find_prometheus() -> Prometheus:
    """Return Prometheus: from the cache, else the machine's own, else fetched now.

    Safe to call in several processes at once. Raises ServerError with what is missing.
    """
    target = cache_folder() / f"prometheus-{os.uname().machine}-r{RECIPE}"
    for found in (Prometheus(target), Prometheus(Path("/usr/bin"))):
        if found.is_usable:
            return found
    with locked(target):
        if not Prometheus(target).is_usable:  # somebody else may have been first
            _build(target)
    if not Prometheus(target).is_usable:
        raise ServerError(
            f"Debian {RELEASE} has Prometheus {Prometheus(target).version or 'that does not run here'} now"
        )
    return Prometheus(target)


def _build(target: Path) -> None:
    """Fetch and unpack, then show the result under its name in one step."""
    print(f"servers: fetching Prometheus from Debian {RELEASE}, 19 MB", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
    try:
        root = scratch / "root"
        root.mkdir()
        for package in PrivateApt(scratch / "apt", RELEASE).fetch(["prometheus"]):
            unpack(package, root)
        shutil.rmtree(target, ignore_errors=True)
        (root / "usr/bin").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
