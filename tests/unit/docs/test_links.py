"""Every link, picture and path of the guides resolves."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.guides import GUIDES, ROOT, anchors, headings, prose, read

_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A folder or a file of the repository, as the guides name one.
_PATH = re.compile(r"`((?:config|consumer|deploy|domains|scripts|tests)/[\w./-]*)")
# To a section of the old README, or to a document outside of the repository.
_POINTER = re.compile(r"""[Cc]ontract,? section \d|\bcontract \d\b|shared/\w+\.md|\bREADME, "?[A-Z]|\bREADME's""")
_TOP = ("config", "consumer", "domains", "scripts", "tests")
PICTURE_BYTES_MAX = 150_000


def _links(guide: str) -> list[str]:
    return [link for link in _LINK.findall(prose(guide)) if not re.match(r"https?://", link)]


def _target(guide: str, link: str) -> tuple[str, str]:
    """Return the file, from the root, and the anchor that *link* in *guide* leads to."""
    path, _, anchor = link.partition("#")
    file = (ROOT / guide).parent / path if path else ROOT / guide
    return str(file.resolve().relative_to(ROOT)), anchor


@pytest.mark.parametrize("guide", GUIDES)
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(guide):
    for link in _links(guide):
        file, anchor = _target(guide, link)
        assert (ROOT / file).exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("guide", GUIDES)
def test_every_path_that_a_guide_names_exists(guide):
    folder = (ROOT / guide).parent
    for name in _PATH.findall(prose(guide)):
        assert (ROOT / name).exists(), name
    # A package's guide names modules relative to the package.
    for name in re.findall(r"`([\w/]+\.py)`", prose(guide)):
        places = [ROOT / name, folder / name, *(path for top in _TOP for path in (ROOT / top).glob(f"**/{name}"))]
        assert any(place.exists() for place in places), name


def test_the_headings_of_a_guide_have_unique_anchors():
    for guide in GUIDES:
        if guide != "CHANGELOG.md":
            assert len(headings(guide)) == len(anchors(guide)), guide


def test_every_picture_that_a_guide_shows_is_small():
    shown = {_target(guide, link)[0] for guide in GUIDES for link in _links(guide) if link.endswith(".png")}
    assert len(shown) > 3
    assert all((ROOT / name).stat().st_size < PICTURE_BYTES_MAX for name in shown)


def test_every_guide_can_be_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {_target(guide, link)[0] for guide in new for link in _links(guide) if ".md" in link} - reached
    assert set(GUIDES) - reached == {"deploy/licences.md"}


def test_the_readme_fits_250_lines():
    assert len(read("README.md").splitlines()) <= 250


def test_no_file_refers_to_a_document_outside_the_repository():
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    found = {
        f"{name}: {pointer[0]}"
        for name in names
        if Path(name).suffix not in {".png", ".xz"} and (ROOT / name).exists() and ROOT / name != Path(__file__)
        for pointer in _POINTER.finditer((ROOT / name).read_text())
    }
    assert found == set()
