"""File systems in the place of base images, made of Debian's packages: debian:13-slim, and distroless Python."""

import os
import shutil
import subprocess
from pathlib import Path

from servers.binaries.apt import PrivateApt, archive_of, unpack

RELEASE = "trixie"  # Debian 13, as both stages of deploy/Dockerfile
# What distroless unpacks into its Python image, by its build files: a C library, the C++ one, and Python's own needs.
# No shell, no apt, no coreutils.
_PYTHON_IMAGE = (
    "base-files",
    "ca-certificates",
    "netbase",
    "tzdata",
    "media-types",
    "libc6",
    "libssl3t64",
    "libzstd1",
    "libgcc-s1",
    "libgomp1",
    "libstdc++6",
    "libbz2-1.0",
    "libdb5.3t64",
    "libexpat1",
    "liblzma5",
    "libsqlite3-0",
    "libuuid1",
    "libncursesw6",
    "libtinfo6",
    "zlib1g",
    "libcom-err2",
    "libcrypt1",
    "libreadline8t64",
    "libffi8",
    "libpython3.13-minimal",
    "libpython3.13-stdlib",
    "python3.13-minimal",
)
_PYTHON = "python3.13"


def make_build_root(root: Path, scratch: Path) -> None:
    """Make a minimal Debian at *root* by debootstrap, which needs no installation itself."""
    (tool,) = PrivateApt(scratch / "apt-debootstrap", RELEASE).fetch(["debootstrap"])
    unpack(tool, scratch)
    run = [str(scratch / "usr/sbin/debootstrap"), "--variant=minbase", RELEASE, str(root), archive_of(RELEASE)]
    home = {"DEBOOTSTRAP_DIR": str(scratch / "usr/share/debootstrap")}
    subprocess.run(run, env={**os.environ, **home}, check=True, stdout=subprocess.DEVNULL)


def make_python_root(root: Path, scratch: Path) -> None:
    """Make at *root* what distroless's Python image is: packages unpacked, none of their scripts run."""
    for folder in ("etc", "proc", "dev", "tmp", "run", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        (root / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # as base-files' scripts would make them
        (root / name).symlink_to(f"usr/{name}")
    for package in PrivateApt(scratch / "apt-python", RELEASE).fetch(_PYTHON_IMAGE):
        unpack(package, root)
    for name in ("python", "python3"):
        (root / "usr/bin" / name).symlink_to(_PYTHON)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532::/home/nonroot:/\n")
    (root / "etc/group").write_text("root:x:0:\nnonroot:x:65532:\n")


def lend_the_registry_s_settings(root: Path) -> dict[str, str]:
    """Give the build in *root* this machine's resolver and pip's settings; return the environment that goes with them.

    An engine would pass on what its own configuration says.
    """
    environ = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or "proxy" in key.lower()}
    lent = {name: root / name.lstrip("/") for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf")}
    if certificates := environ.get("PIP_CERT"):
        # Under a name of its own: Debian's ca-certificates, which Python brings along, writes the usual one.
        environ["PIP_CERT"] = "/run/lent-certificates.pem"
        lent[certificates] = root / environ["PIP_CERT"].lstrip("/")
    for name, copy in lent.items():
        if Path(name).is_file():
            shutil.copy(name, copy)
    return environ
