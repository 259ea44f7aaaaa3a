"""The code blocks of a guide, and whether an output has the form that one of them shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.guides import CODE_BLOCK

# What differs between two runs of a command, and is compared by its kind.
_VARYING = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b[0-9a-f]{32}\b"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?"), "TIME"),
    (re.compile(r"\b\d\d-\d\d \d\d:\d\d:\d\d"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s|min|h|d)\b"), "DURATION"),
    (re.compile(r"version \d+(\.\d+)+"), "version N"),
)


@dataclass(frozen=True)
class Block:
    """One code block and the line on which it starts."""

    guide: str
    language: str
    text: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.guide}:{self.line}"

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Return each command of a console block with the output that the block shows."""
        for prompt in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = prompt.partition("\n")
            yield command, output


def blocks(guide: str, text: str) -> list[Block]:
    return [Block(guide, m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in CODE_BLOCK.finditer(text)]


def trimmed(output: str) -> str:
    """Return *output* without blanks at the ends of lines and without empty lines at either end."""
    lines = [line.rstrip() for line in output.splitlines()]
    return "\n".join(lines).strip("\n") + "\n" if any(lines) else ""


def form(output: str) -> str:
    """Return the words of *output*; ids, times and durations are replaced by their kind."""
    words = " ".join(output.split())
    for pattern, kind in _VARYING:
        words = pattern.sub(kind, words)
    return words


def has_form(output: str, shown: str) -> bool:
    """Return whether *output* is what is *shown*, where a line of three dots stands for any lines."""
    pieces = [re.escape(form(piece)) for piece in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
    return re.fullmatch(r"\s*.*\s*".join(pieces), form(output)) is not None
