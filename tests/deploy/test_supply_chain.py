"""What is deployed: of known hashes, the versions that are tested, under known licences, the same bytes each time."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
from licensing import LISTING, licence_of, listing, pinned

from tests.deploy.dockerfile import make_context
from tests.support.manifests import ROOT

DEPLOY = ROOT / "deploy"
# None of them asks for the source of what is built with them.
LICENCES = {"MIT", "BSD", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC", "PSF-2.0"}
# Copyleft for a file of its own that somebody changes; what is deployed is unchanged.
EXCEPTED = {"certifi": {"MPL-2.0"}}
# What the image has, and what it has where spans are wanted.
DEPLOYED = ("requirements.txt", "requirements-otel.txt")


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
def test_what_is_deployed_is_what_is_tested(name):
    deployed, tested = pinned(DEPLOY / name), pinned(DEPLOY / "requirements-dev.txt")
    assert deployed.items() <= tested.items()


def test_the_extra_adds_packages_and_changes_none():
    assert pinned(DEPLOY / "requirements.txt").items() <= pinned(DEPLOY / "requirements-otel.txt").items()


def test_the_list_of_licences_is_complete_and_current():
    told = LISTING.read_text()
    assert told == listing(), "run scripts/licences"
    listed = re.findall(r"^\| ([\w.-]+) \| (\d\S*) \| ", told, re.MULTILINE)
    assert sorted(listed) == sorted({pair for name in DEPLOYED for pair in pinned(DEPLOY / name).items()})


@pytest.mark.parametrize("file", DEPLOYED)
def test_every_licence_is_known_and_none_is_copyleft_but_for_what_is_named(file):
    for name in pinned(DEPLOY / file):
        assert set(re.split(r" AND | OR ", licence_of(name))) <= LICENCES | EXCEPTED.get(name, set()), name


def test_all_that_is_deployed_is_looked_up_among_the_known_vulnerabilities():
    audited = re.findall(r"--requirement (deploy/\S+)", (ROOT / "scripts" / "audit").read_text())
    looked_up = {pair for file in audited for pair in pinned(ROOT / file).items()}
    assert looked_up == {pair for name in DEPLOYED for pair in pinned(DEPLOY / name).items()}


def test_the_wheel_has_the_same_bytes_wherever_and_whenever_it_is_built(tmp_path):
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
