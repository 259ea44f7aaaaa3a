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
    "3-Clause BSD License": "BSD-3-Clause",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
}

_HEAD = """# Licences of what is deployed

Made by `scripts/licences` from the metadata of the packages in `deploy/requirements.txt`, which is all that the image
has beside Closeout itself (MIT) and its base image, whose licences are in its `/usr/share/doc`. None is copyleft;
`tests/deploy/test_supply_chain.py` fails for one that is not in its list.

"""
_EXTRA = """
## With the extra for spans

What `deploy/requirements-otel.txt` has besides. One is copyleft: certifi, for its own files, where somebody changes
them; it is Python and a list of authorities, and so its own source.

"""
_COLUMNS = """| package | version | licence |
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
    image, with_spans = (pinned(ROOT / "deploy" / name) for name in ("requirements.txt", "requirements-otel.txt"))
    extra = {name: version for name, version in with_spans.items() if name not in image}
    return _HEAD + _table(image) + _EXTRA + _table(extra)


def _table(packages: dict[str, str]) -> str:
    rows = (f"| {name} | {version} | {licence_of(name)} |\n" for name, version in sorted(packages.items()))
    return _COLUMNS + "".join(rows)
