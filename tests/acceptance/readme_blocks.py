"""The README's examples: its code blocks, and whether what was said has the shape that one of them shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What differs from one time to the next, and stands for itself.
_VARYING = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b[0-9a-f]{32}\b"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?"), "TIME"),
    (re.compile(r"\b\d\d-\d\d \d\d:\d\d:\d\d"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s|min|h|d)\b"), "WHILE"),
    (re.compile(r"version \d+(\.\d+)+"), "version N"),
)


@dataclass(frozen=True)
class Block:
    """One fenced block and where it begins."""

    language: str
    text: str
    line: int
    start: int

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Return each command of a console block with what it is shown to say."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, said = part.partition("\n")
            yield command, said


def blocks(text: str) -> list[Block]:
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1, m.start(2)) for m in _FENCED.finditer(text)]


def as_shown(said: str) -> str:
    """Return what was *said* as the README shows it: no blanks at the ends of lines, no empty lines at either end."""
    lines = [line.rstrip() for line in said.splitlines()]
    return "\n".join(lines).strip("\n") + "\n" if any(lines) else ""


def shape(said: str) -> str:
    """Return the words alone, ids, times and lengths of time by their kind."""
    words = " ".join(said.split())
    for pattern, kind in _VARYING:
        words = pattern.sub(kind, words)
    return words


def has_shape(said: str, shown: str) -> bool:
    """Say whether *said* is what is *shown*, where a line of three dots stands for any lines."""
    parts = [re.escape(shape(part)) for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
    return re.fullmatch(r"\s*.*\s*".join(parts), shape(said)) is not None
