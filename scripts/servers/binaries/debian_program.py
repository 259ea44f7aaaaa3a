"""Programs from Debian packages, unpacked into a cache folder. Nothing is installed and no service is started."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from servers.binaries.apt import PrivateApt, unpack
from servers.binaries.cache import cache_folder, locked
from servers.binaries.patchelf import adopt_libraries
from servers.process import ServerError

Numbers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DebianProgram:
    """A program of one Debian release, accepted from version *oldest* up to, but not including, version *before*.

    *version_of* returns the version of what is unpacked below a root folder, and "" if it does not run there.
    """

    name: str
    release: str
    packages: Sequence[str]
    download: str
    version_of: Callable[[Path], str]
    oldest: Numbers
    before: Numbers
    cache_name: str
    recipe: int = 1  # raised when the content of the cache folder changes
    bound_folder: str = ""  # its programs get the C library of their own release; "" if they run with any
    relocate: Callable[[Path, Path], None] | None = None  # called with the unpacked root and its final path
    machine_root: Path | None = Path("/")  # None: an installed program of the machine is not used

    def is_usable(self, root: Path) -> bool:
        """Return whether the program below *root* runs and has an accepted version."""
        version = tuple(map(int, re.findall(r"\d+", self.version_of(root))))
        return self.oldest <= version < self.before

    def find(self) -> Path:
        """Return the root folder of the program: in the cache, else the machine's, else fetched now.

        Safe to call in several processes at once. Raises ServerError with what is missing.
        """
        cached = cache_folder() / f"{self.cache_name}-{os.uname().machine}-r{self.recipe}"
        for root in (cached, self.machine_root):
            if root is not None and self.is_usable(root):
                return root
        with locked(cached):
            if not self.is_usable(cached):  # another process may have fetched it while this one waited
                self._build(cached)
        if not self.is_usable(cached):
            version = self.version_of(cached)
            problem = f"has version {version}, which is not supported" if version else "does not run on this machine"
            raise ServerError(f"{self.name} of Debian {self.release} {problem}")
        return cached

    def _build(self, target: Path) -> None:
        """Fetch, unpack and adapt in a scratch folder, then rename it to *target* in one step."""
        print(f"servers: fetching {self.name} from Debian {self.release}, {self.download}", file=sys.stderr, flush=True)
        scratch = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
        try:
            root = scratch / "root"
            root.mkdir()
            for package in PrivateApt(scratch / "apt", self.release).fetch(self.packages):
                unpack(package, root)
            for unused in ("usr/share", "etc", "var"):
                shutil.rmtree(root / unused, ignore_errors=True)
            if self.relocate:
                self.relocate(root, target)
            if self.bound_folder:
                adopt_libraries(root, final=target, programs=[root / self.bound_folder])
            shutil.rmtree(target, ignore_errors=True)
            root.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _printed_version(command: str, pattern: str) -> Callable[[Path], str]:
    """Return a `version_of` that runs *command* and returns the first group of *pattern* in its output."""
    program, *arguments = command.split()

    def version_of(root: Path) -> str:
        try:
            done = subprocess.run([root / program, *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        found = re.search(pattern, done.stdout + done.stderr)
        return found[1] if found and done.returncode == 0 else ""

    return version_of


# The alert rules are tested on Prometheus 2 only: 3 counts ranges differently.
PROMETHEUS = DebianProgram(
    name="Prometheus",
    release="bookworm",
    packages=["prometheus"],
    download="19 MB",
    version_of=_printed_version("usr/bin/promtool --version", r"version (\S+)"),
    oldest=(2,),
    before=(3,),
    cache_name="prometheus",
    recipe=2,
)
PGBOUNCER_LIBRARIES = (
    "libc6 libaudit1 libcap-ng0 libcap2 libcares2 libevent-2.1-7t64 libpam0g libssl3t64 libsystemd0 libzstd1"
)
# PgBouncer 1.21 is the first that keeps prepared statements in transaction mode; Debian 12 has 1.18.
PGBOUNCER = DebianProgram(
    name="PgBouncer",
    release="trixie",
    packages=["pgbouncer", *PGBOUNCER_LIBRARIES.split()],
    download="9 MB",
    version_of=_printed_version("usr/sbin/pgbouncer --version", r"PgBouncer (\S+)"),
    oldest=(1, 21),
    before=(2,),
    cache_name="pgbouncer",
    bound_folder="usr/sbin",
)
# Only for its Kustomize. Debian 12's kubectl dates from 2020 and does not support Kustomize components.
KUBECTL = DebianProgram(
    name="kubectl with Kustomize",
    release="trixie",
    packages=["kubectl"],
    download="16 MB",
    version_of=_printed_version("usr/bin/kubectl version --client --output=json", r'"kustomizeVersion": "v([^"]+)"'),
    oldest=(5,),
    before=(6,),
    cache_name="kubectl",
    recipe=2,
    machine_root=None,
)
