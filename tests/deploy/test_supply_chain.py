"""Deployed packages are hashed, tested, under accepted licences and audited; the wheel is reproducible."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.dockerfile import make_context
from tests.support.manifests import ROOT

DEPLOY = ROOT / "deploy"
LISTING = DEPLOY / "licences.md"
# None of them requires publishing software that uses the package. Without an SPDX expression, the classifier counts.
LICENCES = {
    "MIT", "MIT License", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "3-Clause BSD License", "Apache-2.0",
    "Apache Software License", "ISC License (ISCL)", "PSF-2.0",
}  # fmt: skip
# Copyleft for changes to its own files; the deployed files are unmodified.
EXCEPTED = {"certifi": {"Mozilla Public License 2.0 (MPL 2.0)"}}
# The image's packages, and the same with the optional dependency group `otel`.
DEPLOYED = ("requirements.txt", "requirements-otel.txt")
_PINNED = re.compile(r"^([\w.-]+)==(\S+)(?!\S| ; sys_platform == 'win32')", re.MULTILINE)


def pinned(requirements: Path) -> dict[str, str]:
    """Return name and version of each package that *requirements* installs on Linux."""
    return dict(_PINNED.findall(requirements.read_text()))


def listed_packages() -> dict[str, tuple[str, str]]:
    """Return version and licences of each package in deploy/licences.md, by normalized name."""
    rows = re.findall(r"^\| ([\w.-]+) +\| (\d\S*) +\| (.*?) +\|$", LISTING.read_text(), re.MULTILINE)
    return {re.sub(r"[._]", "-", name.lower()): (version, licences) for name, version, licences in rows}


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-otel.txt", "requirements-build.txt", "requirements-dev.txt"]
)
def test_every_requirement_is_one_version_with_hashes(name):
    text = (DEPLOY / name).read_text()
    requirements = re.split(r"\n(?=\S)", text.replace("\\\n", " ").strip())
    assert len(requirements) > 5
    for requirement in requirements:
        assert re.match(r"[\w.-]+==\S+( ; [^-]+)?\s+--hash=sha256:[0-9a-f]{64}", requirement), requirement


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-otel.txt", "requirements-build.txt"])
def test_deployed_versions_are_the_tested_versions(name):
    deployed, tested = pinned(DEPLOY / name), pinned(DEPLOY / "requirements-dev.txt")
    assert deployed.items() <= tested.items()


def test_the_otel_group_adds_packages_and_changes_none():
    assert pinned(DEPLOY / "requirements.txt").items() <= pinned(DEPLOY / "requirements-otel.txt").items()


def test_the_list_of_licences_is_complete_and_current(tmp_path):
    subprocess.run([ROOT / "scripts" / "licences", tmp_path / "licences.md"], check=True)
    assert LISTING.read_text() == (tmp_path / "licences.md").read_text(), "run scripts/licences"
    versions = {name: version for name, (version, _) in listed_packages().items()}
    assert versions == {name: version for file in DEPLOYED for name, version in pinned(DEPLOY / file).items()}


def test_every_licence_is_accepted():
    packages = listed_packages()
    assert packages
    for name, (_, licences) in packages.items():
        assert set(re.split(r" AND | OR |; ", licences)) <= LICENCES | EXCEPTED.get(name, set()), name


def test_scripts_audit_checks_every_deployed_package():
    audited = re.findall(r"--requirement (deploy/\S+)", (ROOT / "scripts" / "audit").read_text())
    checked = {pair for file in audited for pair in pinned(ROOT / file).items()}
    assert checked == {pair for name in DEPLOYED for pair in pinned(DEPLOY / name).items()}


def test_the_wheel_is_reproducible(tmp_path):
    digests = []
    for folder, epoch, mode in (("a", 1_700_000_000, 0o755), ("b/deeper", 1_800_000_000, 0o700)):
        source = tmp_path / folder
        make_context(ROOT, DEPLOY / "Dockerfile.dockerignore", source)
        for path in source.rglob("*"):
            os.utime(path, (epoch, epoch))
            path.chmod(mode if path.is_dir() else 0o644)
        build = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            tmp_path / "out" / folder,
        ]
        subprocess.run(build, cwd=source, check=True, capture_output=True)
        (wheel,) = (tmp_path / "out" / folder).glob("*.whl")
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
