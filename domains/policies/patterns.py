"""Bounds on the regular expressions of a condition: RE2 matches in linear time, but compiles anew at every use.

A pattern inside a loop over 1,000 steps is compiled up to 10,000 times, so each must be small and known when the
condition is compiled: a literal, short, and with little counted repetition, which RE2 unrolls.
"""

import re
from collections.abc import Iterator
from math import prod

# Characters of a pattern, and copies that its counted repetitions make in all: (a{1,3}){4} makes 12.
PATTERN_MAX = 200
COPIES_MAX = 100

_STRING = r"""[rRbB]{0,2}(?:\"\"\".*?\"\"\"|'''.*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
_TOKEN = re.compile(rf"(?P<comment>//[^\n]*)|(?P<string>{_STRING})|(?P<word>[A-Za-z_]\w*)|(?P<mark>[^\s\w])", re.DOTALL)
_COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
# Escapes that could spell a brace; a pattern is best written raw, r"\d{3}".
_HIDDEN = re.compile(r"\\[xXuU0-7]")

_Token = tuple[str, str, int]


def pattern_fault(condition: str) -> tuple[str, int] | None:
    """Return what is wrong with a regular expression in *condition*, and where (an offset), or None."""
    tokens = list(_tokens(condition))
    for position, (kind, text, offset) in enumerate(tokens):
        if kind == "word" and text == "matches" and position + 1 < len(tokens) and tokens[position + 1][1] == "(":
            argument = _last_argument(tokens, position + 1)
            fault = "expected a pattern written out as one string" if argument is None else _too_dear(argument)
            if fault:
                return f"matches: {fault}", offset
    return None


def _tokens(condition: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(condition):
        if match.lastgroup != "comment":
            yield str(match.lastgroup), match.group(), match.start()


def _last_argument(tokens: list[_Token], opening: int) -> str | None:
    """Return the literal that is the last argument of the call whose parenthesis opens at *opening*, if it is one."""
    depth = 0
    for position in range(opening, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[position][1], 0) if tokens[position][0] == "mark" else 0
        if depth == 0:
            (kind, text, _), before = tokens[position - 1], tokens[position - 2][1]
            return text if kind == "string" and before in {"(", ","} else None
    return None


def _too_dear(literal: str) -> str | None:
    if len(literal) > PATTERN_MAX:
        return f"a pattern of {len(literal)} characters; expected at most {PATTERN_MAX}"
    if literal[0] not in "rR" and _HIDDEN.search(literal):
        return 'an escape in the pattern; expected it raw, as in r"\\d+"'
    copies = prod(max(1, int(high or low)) for low, high in _COUNTED.findall(literal))
    if copies > COPIES_MAX:
        return f"repetitions that make {copies} copies; expected at most {COPIES_MAX}"
    return None
