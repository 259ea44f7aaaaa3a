"""The project's Markdown files: their sections, headings and anchors."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NOT_OURS = re.compile(r"(^|/)(\.venv[^/]*|\.git|node_modules|\.pytest_cache|\.hypothesis)/")
GUIDES = sorted(name for path in ROOT.rglob("*.md") if not _NOT_OURS.search(name := path.relative_to(ROOT).as_posix()))
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(guide: str) -> str:
    """Return the text of *guide*, a path from the root."""
    return (ROOT / guide).read_text()


def prose(guide: str) -> str:
    """Return *guide* without its code blocks."""
    return CODE_BLOCK.sub("", read(guide))


def section(guide: str, heading: str) -> str:
    """Return the text below *heading*, up to the next heading of the same level or above."""
    level, text = heading.partition(" ")[0], read(guide)
    assert f"\n{heading}\n" in text, f"{guide} has no {heading}"
    below = text.partition(f"\n{heading}\n")[2]
    return re.split(rf"^#{{1,{len(level)}}} ", CODE_BLOCK.sub(_keep_hashes, below), maxsplit=1, flags=re.MULTILINE)[
        0
    ].replace("\0", "#")


def _keep_hashes(block: re.Match[str]) -> str:
    """Hide the hashes of a code block, which are comments and no headings."""
    return block[0].replace("#", "\0")


def headings(guide: str) -> list[str]:
    """Return the headings of *guide*, in order."""
    return re.findall(r"^#+ (.*)$", prose(guide), re.MULTILINE)


def anchors(guide: str) -> set[str]:
    """Return the anchor of each heading, as code hosts make them."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings(guide)}
