"""RabbitMQ and its Erlang, unpacked into a cache folder; nothing is installed on the machine.

Each major is taken from the Debian release that has it, together with that release's own C library, so it runs
beside whatever the machine is: every program gets the loader and the libraries it was built with (patchelf).
"""

import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servers.binaries.apt import PrivateApt, unpack
from servers.binaries.cache import cache_folder, locked
from servers.binaries.patchelf import adopt_libraries
from servers.process import ServerError

Version = Literal["3.10", "4"]
RECIPE = 2  # raise it when what is unpacked or how it is changed differs: old caches are not used any more
ERLANG = "asn1 base crypto eldap inets mnesia os-mon parsetools public-key runtime-tools ssl syntax-tools tools xmerl"
LIBRARIES = "libc6 libcap2 libgcc-s1 libstdc++6 libsystemd0 libtinfo6 libzstd1 zlib1g"


@dataclass(frozen=True)
class Release:
    """Where a major comes from, and the names of libraries that differ between releases."""

    codename: str
    libraries: str

    @property
    def packages(self) -> list[str]:
        """Return everything to fetch."""
        erlang = [f"erlang-{part}" for part in ERLANG.split()]
        return ["rabbitmq-server", *erlang, *LIBRARIES.split(), *self.libraries.split()]


RELEASES: dict[Version, Release] = {
    "3.10": Release("bookworm", "libssl3 libgcrypt20 libgpg-error0 liblz4-1 liblzma5"),
    "4": Release("trixie", "libssl3t64"),
}


@dataclass(frozen=True)
class Installation:
    """RabbitMQ below *root*, which is / for the machine's own."""

    root: Path

    @property
    def home(self) -> Path:
        """Return the folder of RabbitMQ itself: sbin, escript, plugins."""
        found = sorted((self.root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*"))
        return found[-1] if found else self.root / "usr/lib/rabbitmq/lib/none"

    @property
    def erlang(self) -> Path:
        """Return the folder of erl, epmd and erl_call."""
        return self.root / "usr/lib/erlang/bin"

    @property
    def version(self) -> str:
        """Return RabbitMQ's full version, empty if there is none."""
        return self.home.name.partition("-")[2]

    def offers(self, version: Version) -> bool:
        """Tell whether this is RabbitMQ of the line *version*."""
        return f"{self.version}.".startswith(f"{version}.") and (self.home / "sbin/rabbitmq-server").exists()


def find_rabbitmq(version: Version) -> Installation:
    """Return RabbitMQ of the line *version*: from the cache, else the machine's own, else fetched now.

    Safe to call in several processes at once. Raises ServerError with what is missing.
    """
    target = cache_folder() / f"rabbitmq-{version}-{os.uname().machine}-r{RECIPE}"
    for place in (target, Path("/")):
        if Installation(place).offers(version):
            return Installation(place)
    with locked(target):
        if not Installation(target).offers(version):  # somebody else may have been first
            _build(RELEASES[version], target)
    if not Installation(target).offers(version):
        raise ServerError(f"Debian {RELEASES[version].codename} has RabbitMQ {Installation(target).version} now")
    return Installation(target)


def _build(release: Release, target: Path) -> None:
    """Fetch, unpack and adapt, then show the result under its name in one step."""
    print(f"servers: fetching RabbitMQ from Debian {release.codename}, 45 MB", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
    try:
        root = scratch / "root"
        root.mkdir()
        for package in PrivateApt(scratch / "apt", release.codename).fetch(release.packages):
            unpack(package, root)
        for unused in ("usr/share", "etc", "var"):
            shutil.rmtree(root / unused, ignore_errors=True)
        _set_root(root, final=target)
        adopt_libraries(root, final=target, programs=[root / "usr/lib/erlang"])
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _set_root(root: Path, *, final: Path) -> None:
    """Tell Erlang's start scripts where they are; they know only /usr/lib/erlang."""
    erlang = root / "usr/lib/erlang"
    for script in (erlang / "bin/erl", *erlang.glob("erts-*/bin/erl")):
        text = re.sub(
            r"\bROOTDIR=/usr/lib/erlang$", f'ROOTDIR="{final}/usr/lib/erlang"', script.read_text(), flags=re.MULTILINE
        )
        script.write_text(text)
