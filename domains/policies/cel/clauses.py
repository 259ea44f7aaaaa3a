"""Splits a condition into the clauses that ``&&`` and ``||`` join, each with its original text.

The syntax tree has no text, so the text is split, and the result is verified against the tree.
"""

import re
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
    part = _part(plain, bare)
    return part if _joins(part) == _joins_of(tree) else Part(text.strip())


def _part(plain: str, bare: str) -> Part:
    """Split *plain*; *bare* is the same text with strings and comments blanked."""
    start, end = len(bare) - len(bare.lstrip()), len(bare.rstrip())
    plain, bare = plain[start:end], bare[start:end]
    outside = _outside(bare)
    if bare.startswith("(") and not outside[:-1].strip():
        return _part(plain[1:-1], bare[1:-1])
    if "?" not in outside:
        for sign, join in _JOINS:
            if sign in outside:
                ends = [*(found.start() for found in re.finditer(re.escape(sign), outside)), len(bare)]
                starts = [0, *(end + len(sign) for end in ends)]
                return Part(
                    plain, join, tuple(_part(plain[a:b], bare[a:b]) for a, b in zip(starts, ends, strict=False))
                )
    return Part(plain)


def _outside(bare: str) -> str:
    """Return *bare* with spaces in place of brackets and what they enclose, except the last closing bracket."""
    text, depth = "", 0
    for character in bare:
        depth += (character in "([{") - (character in ")]}")
        text += " " if depth else character
    return text


def _joins(part: Part) -> list[str]:
    """Return the operators in order, the only basis to compare text and tree."""
    if part.join is None:
        return []
    sign = {"any": "_||_", "all": "_&&_"}[part.join]
    first, *rest = map(_joins, part.parts)
    return first + [operator for joins in rest for operator in (sign, *joins)]


def _joins_of(tree: Node) -> list[str]:
    if isinstance(tree, Call) and tree.function in {"_||_", "_&&_"}:
        one, other = tree.arguments
        return [*_joins_of(one), tree.function, *_joins_of(other)]
    return []
