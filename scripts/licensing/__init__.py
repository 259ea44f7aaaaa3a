"""The licences of what is deployed, as the packages themselves state them."""

import re
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[2]
LISTING = ROOT / "deploy" / "licences.md"
# A package for another system: `colorama==0.4.6 ; sys_platform == 'win32'`. Those for other Pythons are in the image's.
_PINNED = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)
_OTHER_SYSTEM = re.compile(r"^[\w.-]+==\S+ ; sys_platform == 'win32'.*$", re.MULTILINE)
# What older metadata say in words of their own.
_WORDS = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
}

_HEAD = """# Licences of what is deployed

Made by `scripts/licences` from the metadata of the packages in `deploy/requirements.txt`, which is all that the image
has beside Closeout itself (MIT) and its base image, whose licences are in its `/usr/share/doc`. None is copyleft;
`tests/deploy/test_supply_chain.py` fails for one that is not in its list.

| package | version | licence |
| --- | --- | --- |
"""


def pinned(requirements: Path) -> dict[str, str]:
    """Return name and version of each package that *requirements* installs on Linux."""
    return dict(_PINNED.findall(_OTHER_SYSTEM.sub("", requirements.read_text())))


def licence_of(name: str) -> str:
    """Return what the installed package *name* says of its licence, as an SPDX expression where it does not already."""
    metadata = cast("Message", distribution(name).metadata)
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classes = [str(c).rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    stated = classes or [str(metadata.get("License", "unknown")).splitlines()[0]]
    return " AND ".join(sorted({_WORDS.get(words, words) for words in stated}))


def listing() -> str:
    """Return the file's text, from what is installed here."""
    packages = sorted(pinned(ROOT / "deploy" / "requirements.txt").items())
    return _HEAD + "".join(f"| {name} | {version} | {licence_of(name)} |\n" for name, version in packages)
