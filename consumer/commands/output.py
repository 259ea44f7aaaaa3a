"""How commands speak: results on standard output, everything else on standard error."""

import sys
from typing import NoReturn

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

EXIT_FOUND = 1
EXIT_USAGE = 2

_encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=str)

# rich respects NO_COLOR and the absence of a terminal by itself.
# Into a file or a pipe a table is as wide as it needs to be: an id that is cut short is of no use.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 250)
err = Console(stderr=True, highlight=False)


def say(words: str | Text, style: str = "") -> None:
    """Print *words*, without markup: between words wrapped on a terminal, one line into a pipe."""
    out.print(Text(words) if isinstance(words, str) else words, style=style, soft_wrap=not out.is_terminal)


def hanging(head: Text | str, words: str) -> None:
    """Print *words* behind *head*: on a terminal wrapped below their own beginning, one line into a pipe."""
    if not out.is_terminal:
        say(Text.assemble(head, words))
        return
    grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"))
    grid.add_row(Text.assemble(head), Text(words))
    out.print(grid)


def print_json(value: object) -> None:
    """Print *value* as one JSON document, dates in RFC 3339 and decimals as numbers."""
    encoded = _encoder.encode(value)
    sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")


def fail(message: str, *, status: int = EXIT_FOUND) -> NoReturn:
    """Say *message* on standard error and end with *status*."""
    typer.echo(message, err=True)
    raise typer.Exit(status)
