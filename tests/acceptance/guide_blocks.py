"""The code blocks of a guide, and whether an output has the form that one of them shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from tests.support.guides import CODE_BLOCK

# Values that differ between two runs of a command; they are compared by kind.
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
    """Return the words of *output*; ids, times and durations are replaced with their kind."""
    words = " ".join(output.split())
    for pattern, kind in _VARYING:
        words = pattern.sub(kind, words)
    return words


def has_form(output: str, shown: str) -> bool:
    """Return whether *output* matches *shown*, in which a line of three dots matches any lines."""
    pieces = [re.escape(form(piece)) for piece in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
    return re.fullmatch(r"\s*.*\s*".join(pieces), form(output)) is not None


def refreshed(shown: str, output: str) -> str:
    """Return *shown*, its lines between omissions replaced with the lines of *output* that resemble them most."""
    lines, end, pieces = output.splitlines(), 0, []
    for piece in re.split(r"^\.\.\.$\n?", shown, flags=re.MULTILINE):
        old = piece.splitlines()
        spans = [
            lines[i:j] for i in range(end, len(lines)) for j in range(i + 1, min(len(lines), i + len(old) + 3) + 1)
        ]
        new = max(spans, key=lambda span: _resemblance(old, span)) if old and spans else []
        end = lines.index(new[-1], end) + 1 if new else end
        pieces.append("".join(f"{line}\n" for line in new))
    return "...\n".join(pieces)


def _resemblance(old: list[str], new: list[str]) -> float:
    """Compare all lines, and the first and the last line again, because a piece is cut there."""
    pairs = (("\n".join(old), "\n".join(new)), (old[0], new[0]), (old[-1], new[-1]))
    return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs)
