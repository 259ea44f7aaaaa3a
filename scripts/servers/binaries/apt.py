"""Packages of a Debian release, fetched and unpacked without installing anything.

Everything apt writes goes to a private folder; the machine's own lists, sources and packages stay untouched.
Only the address of the mirror and the keyrings are the machine's. apt checks the release's signature and the
packages' hashes as always.
"""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from servers.process import ServerError

PAUSES = (2.0, 10.0)  # seconds before the next attempt; a mirror that is being updated answers wrongly for a while
TOTAL_SECONDS = 600
MAIN_PACKAGES = re.compile(r"^'(\S+?)/+dists/([^/']+)/main/binary-[^/']+/Packages\b", re.MULTILINE)


class AptError(ServerError):
    """apt could not do it: its own words."""


class PrivateApt:
    """apt for *release* ("bookworm"), with its own state below *folder*."""

    def __init__(self, folder: Path, release: str) -> None:
        self.release = release
        self.folder = folder
        for part in ("lists/partial", "archives/partial", "debs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        self._sources = folder / "release.sources"

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """Download *packages* in their newest version and return the files."""
        archive = archive_of(self.release)
        self._sources.write_text(f"Types: deb\nURIs: {archive}\nSuites: {self.release}\nComponents: main\n")
        # By itself `update` succeeds, with a warning, when the archive did not answer.
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
            "Dir::Etc::preferences": "-",  # a pin for the machine's release is not meant for another
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
                said = f"{done.stdout}{done.stderr}".strip()
                raise AptError(f"apt-get {words[0]} for Debian {self.release} failed:\n{said}")
            time.sleep(pause)


def unpack(package: Path, root: Path) -> None:
    """Unpack the files of *package* below *root*; none of its scripts runs."""
    done = _run(["dpkg-deb", "-x", str(package), str(root)], cwd=root)
    if done.returncode:
        raise AptError(f"{package.name} could not be unpacked: {done.stderr}")


def archive_of(release: str) -> str:
    """Return the address of the machine's own Debian archive, in which *release* is looked for."""
    # Of apt's own tools only this one tells the sources, whatever their format, before there are any lists.
    done = _run(["apt-get", "update", "--print-uris"], cwd=Path("/"))
    suites = {_codename(), "stable", "oldstable", release}
    found = [address for address, suite in MAIN_PACKAGES.findall(done.stdout) if suite in suites]
    found.sort(key=lambda address: not address.endswith("/debian"))  # a vendor's archive may have a main, too
    if not found:
        raise AptError(
            f"no Debian archive of {' or '.join(sorted(suites))} among the machine's apt sources, and RabbitMQ, "
            "PgBouncer and Prometheus can only be fetched from one. Where the packages rabbitmq-server, pgbouncer and "
            "prometheus are installed, those are used instead."
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
            f"{argv[0]} is missing; RabbitMQ, PgBouncer, Prometheus and kubectl can only be fetched on Debian"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise AptError(f"{argv[0]} did not end within {TOTAL_SECONDS} s") from error
