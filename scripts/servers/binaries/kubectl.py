"""kubectl, for its Kustomize, unpacked into a cache folder: nothing is installed, no cluster is needed."""

import json
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

RELEASE, LINE = "trixie", "v5"  # Debian 12's is of 2020, before components; 13's runs on 12 as well
RECIPE = 1  # raise it when what is unpacked differs: old caches are not used any more


@dataclass(frozen=True)
class Kubectl:
    """The program at *path*."""

    path: Path

    @property
    def kustomize_version(self) -> str:
        """Return the version of the Kustomize in it, empty where it does not run."""
        try:
            words = ["version", "--client", "--output=json"]
            done = subprocess.run([self.path, *words], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return str(json.loads(done.stdout).get("kustomizeVersion", "")) if done.returncode == 0 else ""

    @property
    def is_usable(self) -> bool:
        """Tell whether it is there, with a Kustomize of the line that the manifests are tested on."""
        return self.path.exists() and self.kustomize_version.startswith(f"{LINE}.")

    def kustomize(self, folder: Path) -> str:
        """Return what ``kubectl kustomize`` makes of *folder*; raise ServerError with its words where it refuses."""
        done = subprocess.run([self.path, "kustomize", folder], capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:  # a deprecated field is only warned of
            raise ServerError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
        return done.stdout


def find_kubectl() -> Kubectl:
    """Return kubectl: from the cache, else fetched now. The machine's own is not asked: it may be of any age.

    Safe to call in several processes at once. Raises ServerError with what is missing.
    """
    target = cache_folder() / f"kubectl-{os.uname().machine}-r{RECIPE}"
    kubectl = Kubectl(target / "kubectl")
    if not kubectl.is_usable:
        with locked(target):
            if not kubectl.is_usable:  # somebody else may have been first
                _build(target)
    if not kubectl.is_usable:
        raise ServerError(f"Debian {RELEASE} has Kustomize {kubectl.kustomize_version or 'that does not run here'} now")
    return kubectl


def _build(target: Path) -> None:
    """Fetch and unpack, then show the result under its name in one step."""
    print(f"servers: fetching kubectl from Debian {RELEASE}, 16 MB", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
    try:
        root = scratch / "root"
        root.mkdir()
        for package in PrivateApt(scratch / "apt", RELEASE).fetch(["kubectl"]):
            unpack(package, root)
        shutil.rmtree(target, ignore_errors=True)
        (root / "usr/bin").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
