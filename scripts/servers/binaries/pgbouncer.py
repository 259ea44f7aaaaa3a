"""PgBouncer, unpacked into a cache folder with the C library that it was built for; nothing is installed.

From Debian 13: the one of Debian 12 (1.18) knows nothing of prepared statements in transaction mode.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from servers.binaries.apt import PrivateApt, unpack
from servers.binaries.cache import cache_folder, locked
from servers.binaries.patchelf import adopt_libraries
from servers.process import ServerError

RELEASE = "trixie"
# The first that keeps clients' prepared statements apart in transaction mode.
OLDEST = (1, 21)
LIBRARIES = "libc6 libaudit1 libcap-ng0 libcap2 libcares2 libevent-2.1-7t64 libpam0g libssl3t64 libsystemd0 libzstd1"
RECIPE = 1  # raise it when what is unpacked or how it is changed differs: old caches are not used any more


def find_pgbouncer() -> Path:
    """Return PgBouncer's program: from the cache, else the machine's own, else fetched now.

    Safe to call in several processes at once. Raises ServerError with what is missing.
    """
    target = cache_folder() / f"pgbouncer-{os.uname().machine}-r{RECIPE}"
    program = target / "usr/sbin/pgbouncer"
    for found in (program, Path("/usr/sbin/pgbouncer")):
        if version_of(found) >= OLDEST:
            return found
    with locked(target):
        if version_of(program) < OLDEST:  # somebody else may have been first
            _build(target)
    if version_of(program) < OLDEST:
        raise ServerError(f"Debian {RELEASE} has a PgBouncer that does not run here, or is too old: {program}")
    return program


def version_of(program: Path) -> tuple[int, ...]:
    """Return the version of *program*, (0,) where it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return (0,)
    words = done.stdout.split()  # "PgBouncer 1.24.1\nlibevent ..."
    return tuple(map(int, words[1].split("."))) if done.returncode == 0 and len(words) > 1 else (0,)


def _build(target: Path) -> None:
    """Fetch, unpack and adapt, then show the result under its name in one step."""
    print(f"servers: fetching PgBouncer from Debian {RELEASE}, 9 MB", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
    try:
        root = scratch / "root"
        root.mkdir()
        for package in PrivateApt(scratch / "apt", RELEASE).fetch(["pgbouncer", *LIBRARIES.split()]):
            unpack(package, root)
        for unused in ("usr/share", "etc", "var"):
            shutil.rmtree(root / unused, ignore_errors=True)
        adopt_libraries(root, final=target, programs=[root / "usr/sbin"])
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
