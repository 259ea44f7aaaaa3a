"""Fetches and unpacks packages of a Debian release without installing them.

apt writes only to a private folder; the lists, sources and packages of the machine do not change. The address of the
mirror and the keyrings are those of the machine, and apt checks signatures and hashes as usual.
"""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from servers.process import ServerError

PAUSES = (2.0, 10.0)  # seconds before the next attempt; a mirror is inconsistent while it is being updated
TOTAL_SECONDS = 600
MAIN_PACKAGES = re.compile(r"^'(\S+?)/+dists/([^/']+)/main/binary-[^/']+/Packages\b", re.MULTILINE)


class AptError(ServerError):
    """apt failed; the message is its output."""


class PrivateApt:
    """apt for *release*, for example "bookworm", with its state below *folder*."""

    def __init__(self, folder: Path, release: str) -> None:
        self.release = release
        self.folder = folder
        for part in ("lists/partial", "archives/partial", "debs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        self._sources = folder / "release.sources"

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """Download the newest version of *packages* and return the files."""
        archive = archive_of(self.release)
        self._sources.write_text(f"Types: deb\nURIs: {archive}\nSuites: {self.release}\nComponents: main\n")
        # Without Error-Mode, `update` succeeds with a warning if the archive does not respond.
        self._get("update", "-q", "-o", "APT::Update::Error-Mode=any", "-o", "Acquire::Languages=none")
        self._get("download", "-q", *packages)
        return sorted((self.folder / "debs").glob("*.deb"))

    def _get(self, *words: str) -> None:
        options = {
            "Dir::State": f"{self.folder}/",
            "Dir::State::lists": f"{self.folder}/lists",
            "Dir::State::status": f"{self.folder}/status",
            "Dir::Cache": f"{self.folder}/",
            "Dir::Etc::sourcelist": str(self._sources),
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",  # pins are meant for the machine's release
            "Dir::Etc::preferencesparts": "-",
            "APT::Sandbox::User": "",  # the user _apt could not write below our folder
            "APT::Update::Post-Invoke": "",
            "APT::Update::Post-Invoke-Success": "",
            "Acquire::Retries": "2",
        }
        arguments = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        for pause in (*PAUSES, None):
            done = _run(["apt-get", *arguments, *words], cwd=self.folder / "debs")
            if done.returncode == 0:
                return
            if pause is None:
                output = f"{done.stdout}{done.stderr}".strip()
                raise AptError(f"apt-get {words[0]} for Debian {self.release} failed:\n{output}")
            time.sleep(pause)


def unpack(package: Path, root: Path) -> None:
    """Unpack the files of *package* below *root*, without running its scripts."""
    done = _run(["dpkg-deb", "-x", str(package), str(root)], cwd=root)
    if done.returncode:
        raise AptError(f"{package.name} cannot be unpacked: {done.stderr}")


def archive_of(release: str) -> str:
    """Return the address of the machine's Debian archive, which also holds *release*."""
    # The only apt command that prints the sources in any format before lists are downloaded.
    done = _run(["apt-get", "update", "--print-uris"], cwd=Path("/"))
    suites = {_codename(), "stable", "oldstable", release}
    found = [address for address, suite in MAIN_PACKAGES.findall(done.stdout) if suite in suites]
    found.sort(
        key=lambda address: not address.endswith("/debian")
    )  # an archive of a vendor may also have a main component
    if not found:
        raise AptError(
            f"the apt sources of this machine contain no Debian archive of {' or '.join(sorted(suites))}. RabbitMQ, "
            "PgBouncer and Prometheus are fetched from one. Add one, or install the packages rabbitmq-server, "
            "pgbouncer and prometheus."
        )
    return str(found[0])


def _codename() -> str:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except FileNotFoundError:
        return ""
    return dict(line.replace('"', "").split("=", 1) for line in lines if "=" in line).get("VERSION_CODENAME", "")


def _run(argv: Sequence[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(
            argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=TOTAL_SECONDS
        )
    except FileNotFoundError as error:
        raise AptError(
            f"{argv[0]} is missing: RabbitMQ, PgBouncer, Prometheus and kubectl can be fetched only on Debian"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise AptError(f"{argv[0]} did not finish within {TOTAL_SECONDS} s") from error
