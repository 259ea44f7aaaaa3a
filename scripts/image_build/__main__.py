"""Build deploy/Dockerfile with buildah and run `closeout --version` and `closeout --help` in the image.

Needs root. The commands run as Kubernetes runs them: as user 65532, without capabilities, on a read-only root file
system. The base images are made from the machine's Debian mirror, not pulled from a container registry; whether the
registry's images are equal to them is not checked.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from servers.binaries.apt import archive_of
from servers.binaries.cache import cache_folder, locked
from servers.process import ServerError
from servers.service_pair import end_on_signals

from image_build.package_index import pip_mounts

CHECKOUT = Path(__file__).resolve().parents[2]
RELEASE = "trixie"  # Debian 13, as in both stages of deploy/Dockerfile
BASE_PACKAGES = "ca-certificates,python3"
UNUSED = ("dev/*", "var/cache/apt/*.bin", "var/cache/apt/archives/*.deb", "var/lib/apt/lists/*", "usr/share/[dlm]o*/*")
BASE_MAX_AGE_SECONDS = 30 * 86_400  # an older base image makes apt replace many packages in each build
BASE, IMAGE = "localhost/debian-python", "localhost/closeout"
USER = "65532"


class ImageError(Exception):
    """A step failed; the message is its output."""


class Store:
    """A private buildah image store below *folder*; several stores can be used at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        places = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._buildah = ["buildah", *places, "--storage-driver", "vfs"]

    def run(self, *words: str) -> str:
        """Run a buildah command and return its standard output."""
        return run([*self._buildah, *words], environ={"TMPDIR": str(self._folder)})

    def build(self) -> Path:
        """Build deploy/Dockerfile and return the image's root folder, mounted until :meth:`remove`."""
        container = self.run("from", "scratch")
        self.run("add", container, str(base_archive()), "/")
        self.run("commit", "--rm", container, BASE)
        isolation = ["--isolation", "chroot", "--pull-never", "--format", "oci"]
        bases = ["--build-arg", f"BUILD={BASE}", "--build-arg", f"BASE={BASE}"]
        dockerfile = ["--file", str(CHECKOUT / "deploy/Dockerfile")]
        ignore = ["--ignorefile", str(CHECKOUT / "deploy/Dockerfile.dockerignore")]
        mounts = pip_mounts(self._folder)
        self.run("bud", *isolation, *bases, *mounts, *dockerfile, *ignore, "--tag", IMAGE, str(CHECKOUT))
        return Path(self.run("mount", self.run("from", "--pull-never", IMAGE)))

    def remove(self) -> None:
        """Unmount all containers and delete all images."""
        run([*self._buildah, "rm", "--all"], check=False)
        run([*self._buildah, "rmi", "--all", "--force"], check=False)


def base_archive() -> Path:
    """Return the cached archive of a minimal Debian with Python; make it if it is missing or old."""
    target = cache_folder() / f"debian-{RELEASE}-{os.uname().machine}-r1.tar"
    with locked(target):
        if target.exists() and time.time() - target.stat().st_mtime < BASE_MAX_AGE_SECONDS:
            return target
        print(f"image: making a base image with debootstrap from Debian {RELEASE}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=target.parent) as name:
            root, archive = Path(name, "root"), Path(name, "root.tar")
            packages = [f"--include={BASE_PACKAGES}", "--variant=minbase"]
            run(["debootstrap", *packages, RELEASE, str(root), archive_of(RELEASE)])
            unused = [f"--exclude=./{pattern}" for pattern in UNUSED]  # each megabyte is copied six times in a build
            run(["tar", "--create", "--file", str(archive), "--directory", str(root), *unused, "."])
            archive.rename(target)
    return target


def run_read_only(root: Path, *arguments: str) -> str:
    """Run the image's closeout as its user on a read-only root, in its own process and mount namespaces."""
    script = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && root=$1 && shift && exec setpriv --no-new-privs '
        f'unshare --pid --fork --kill-child --root "$root" --setuid {USER} --setgid {USER} '
        '/opt/closeout/bin/closeout "$@"'
    )
    return run(["unshare", "--mount", "sh", "-c", script, "sh", str(root), *arguments], environ={"COLUMNS": "100"})


def run(argv: list[str], *, environ: dict[str, str] | None = None, check: bool = True) -> str:
    """Run *argv* and return its standard output; raise :class:`ImageError` if it fails and *check* is set."""
    done = subprocess.run(
        argv, env={**os.environ, "LC_ALL": "C.UTF-8", **(environ or {})}, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise ImageError(
            f"{' '.join(argv)[:200]} exited with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout.strip()


def missing() -> str | None:
    """Return why the image cannot be built here, after installing Debian packages that are missing; None if it can."""
    if os.getuid() != 0:
        return "not run: needs root, for chroot and mounts"
    needed = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if needed and not shutil.which("apt-get"):
        return f"not run: {' and '.join(needed)} is missing, and there is no apt-get to install it"
    if needed:
        print(f"image: installing Debian's {' and '.join(needed)}", file=sys.stderr, flush=True)
        run(["apt-get", "update", "-q"], check=False)
        try:
            noninteractive = {"DEBIAN_FRONTEND": "noninteractive"}
            run(["apt-get", "install", "-qy", "--no-install-recommends", *needed], environ=noninteractive)
        except ImageError as error:
            return f"not run: {error}"
    return None


def main() -> int:
    """Build the image, run its command and print the output; return 2 if this machine cannot build it."""
    argparse.ArgumentParser("scripts/image", description=__doc__).parse_args()
    end_on_signals()
    with tempfile.TemporaryDirectory(prefix="closeout-image-", ignore_cleanup_errors=True) as name:
        store = Store(Path(name))
        try:
            if reason := missing():
                print(f"image: {reason}", file=sys.stderr)
                return 2
            started = time.monotonic()
            root = store.build()
            print(f"image: built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            print(run_read_only(root, "--version"))
            print(run_read_only(root, "--help"))
        except (ImageError, ServerError) as error:
            print(f"image: {error}", file=sys.stderr)
            return 1
        finally:
            store.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
