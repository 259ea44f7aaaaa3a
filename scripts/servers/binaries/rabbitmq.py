"""RabbitMQ and its Erlang, unpacked into a cache folder.

Each version is taken from the Debian release that has it, together with the C library of that release, so that it
runs on any machine: patchelf binds every program to the loader and the libraries that it was built with.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servers.binaries.debian_program import DebianProgram, Numbers

Version = Literal["4", "3.10"]
DEFAULT_VERSION: Version = "4"
ERLANG = "asn1 base crypto eldap inets mnesia os-mon parsetools public-key runtime-tools ssl syntax-tools tools xmerl"
BOOKWORM_LIBRARIES = "libssl3 libgcrypt20 libgpg-error0 liblz4-1 liblzma5"
LIBRARIES = "libc6 libcap2 libgcc-s1 libstdc++6 libsystemd0 libtinfo6 libzstd1 zlib1g"


@dataclass(frozen=True)
class Installation:
    """RabbitMQ below *root*, which is / if the machine has it installed."""

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
        """Return the full version of RabbitMQ, "" if there is none."""
        return self.home.name.partition("-")[2] if (self.home / "sbin/rabbitmq-server").exists() else ""


def find_rabbitmq(version: Version) -> Installation:
    """Return RabbitMQ *version*: from the cache, else the machine's, else fetched now.

    Safe to call in several processes at once. Raises ServerError with what is missing.
    """
    return Installation(RELEASES[version].find())


def _relocate(root: Path, final: Path) -> None:
    """Write the path *final* into the start scripts of Erlang, which hold /usr/lib/erlang."""
    erlang = root / "usr/lib/erlang"
    for script in (erlang / "bin/erl", *erlang.glob("erts-*/bin/erl")):
        text = re.sub(
            r"\bROOTDIR=/usr/lib/erlang$", f'ROOTDIR="{final}/usr/lib/erlang"', script.read_text(), flags=re.MULTILINE
        )
        script.write_text(text)


def _release(version: Version, codename: str, libraries: str, *, oldest: Numbers, before: Numbers) -> DebianProgram:
    erlang = [f"erlang-{part}" for part in ERLANG.split()]
    return DebianProgram(
        name="RabbitMQ",
        release=codename,
        packages=["rabbitmq-server", *erlang, *LIBRARIES.split(), *libraries.split()],
        download="45 MB",
        version_of=lambda root: Installation(root).version,
        oldest=oldest,
        before=before,
        cache_name=f"rabbitmq-{version}",
        recipe=2,
        bound_folder="usr/lib/erlang",
        relocate=_relocate,
    )


RELEASES: dict[Version, DebianProgram] = {
    "4": _release("4", "trixie", "libssl3t64", oldest=(4,), before=(5,)),
    "3.10": _release("3.10", "bookworm", BOOKWORM_LIBRARIES, oldest=(3, 10), before=(3, 11)),
}
