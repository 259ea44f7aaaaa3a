"""Splits a condition into the clauses that ``&&`` and ``||`` join, each with its original text.

The syntax tree has no text, so the text is split, and the result is verified against the tree.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from domains.policies.cel.syntax import Call, Node

_JOINS: tuple[tuple[str, Literal["any", "all"]], ...] = (("||", "any"), ("&&", "all"))
# Text in which brackets and operators have no meaning: comments and strings.
_QUOTED = re.compile(
    r"""
      (?P<comment>//[^\n]*)
    | (?:[rR][bB]?|[bB][rR]?)?
      (?: \"{3}(?:\\.|.)*?\"{3} | '{3}(?:\\.|.)*?'{3} | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' )
    | `[^`\n]*`
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A clause of a condition; ``text`` alone is a valid condition.

    ``join`` states whether all or any of ``parts`` must be true; null if the clause is not split further.
    """

    text: str
    join: Literal["any", "all"] | None = None
    parts: tuple["Part", ...] = ()


def parts_of(text: str, tree: Node) -> Part:
    """Split the condition *text* with syntax tree *tree*; it is not split where the two disagree."""
    plain = _QUOTED.sub(lambda found: " " * len(found[0]) if found["comment"] else found[0], text)
    bare = _QUOTED.sub(lambda found: "_" * len(found[0]), plain)
    divided = _part(plain, bare)
    return divided if _shape(divided) == _shape_of(tree) else Part(text.strip())


def _part(plain: str, bare: str) -> Part:
    """Split *plain*; *bare* is the same text with strings and comments blanked."""
    start, end = _trimmed(bare)
    plain, bare = plain[start:end], bare[start:end]
    if not any(_outside(bare, "?")):
        for sign, join in _JOINS:
            places = list(_outside(bare, sign))
            if places:
                starts = [0, *(place + len(sign) for place in places)]
                ends = [*places, len(bare)]
                inner = (_part(plain[a:b], bare[a:b]) for a, b in zip(starts, ends, strict=True))
                return Part(plain, join, tuple(inner))
    return Part(plain)


def _trimmed(bare: str) -> tuple[int, int]:
    """Return the bounds of *bare* without surrounding white space and brackets."""
    start, end = 0, len(bare)
    while True:
        start += len(bare[start:end]) - len(bare[start:end].lstrip())
        end -= len(bare[start:end]) - len(bare[start:end].rstrip())
        if not _is_bracketed(bare[start:end]):
            return start, end
        start, end = start + 1, end - 1


def _is_bracketed(bare: str) -> bool:
    depths = list(_depths(bare))
    return bare.startswith("(") and bare.endswith(")") and all(depth > 0 for depth in depths[:-1])


def _outside(bare: str, sign: str) -> Iterator[int]:
    """Yield the positions of *sign* outside all brackets."""
    for place, depth in enumerate(_depths(bare)):
        if depth == 0 and bare.startswith(sign, place):
            yield place


def _depths(bare: str) -> Iterator[int]:
    depth = 0
    for character in bare:
        depth += (character in "([{") - (character in ")]}")
        yield depth


def _shape(part: Part) -> list[str]:
    """Return the operators and parts in order, the only basis to compare text and tree."""
    if part.join is None:
        return ["part"]
    sign = {"any": "_||_", "all": "_&&_"}[part.join]
    first, *rest = (_shape(inner) for inner in part.parts)
    return first + [item for shape in rest for item in (sign, *shape)]


def _shape_of(tree: Node) -> list[str]:
    if isinstance(tree, Call) and tree.function in {"_||_", "_&&_"}:
        one, other = tree.arguments
        return [*_shape_of(one), tree.function, *_shape_of(other)]
    return ["part"]
