"""Output of commands: results on standard output, everything else on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import NoReturn

import msgspec
import rich.progress
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from config.terminal import escaped_json
from consumer.wording import Progress

EXIT_FOUND = 1
EXIT_USAGE = 2

_encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=str)

# rich handles NO_COLOR and the absence of a terminal. In a pipe a table may have any width: a cut id is useless.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 250)
err = Console(stderr=True, highlight=False)


def print_line(line: str | Text, style: str = "") -> None:
    """Print *line* without markup: wrapped between words on a terminal, one line in a pipe."""
    out.print(Text(line) if isinstance(line, str) else line, style=style, soft_wrap=not out.is_terminal)


def print_hanging(head: Text | str, text: str) -> None:
    """Print *text* after *head*: on a terminal with a hanging indent, one line in a pipe."""
    if not out.is_terminal:
        print_line(Text.assemble(head, text))
        return
    grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"))
    grid.add_row(Text.assemble(head), Text(text))
    out.print(grid)


def printable(text: str, *, keep: str = "") -> str:
    """Return *text* with everything a terminal might act on (controls, bidi marks, surrogates) escaped as in JSON."""
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_time(at: datetime) -> str:
    """Return *at* in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


@contextmanager
def progress_bar(title: str, *, estimate: bool = False) -> Iterator[Progress]:
    """Show a progress bar on a terminal; yield the function that takes the done and the total number.

    *estimate* adds the remaining time.
    """
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = rich.progress.Progress(*columns, *([TimeRemainingColumn()] if estimate else []), console=err, transient=True)
    with bar if err.is_terminal else nullcontext():
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: object) -> None:
    """Print *value* as one JSON document, dates in RFC 3339 and decimals as numbers."""
    encoded = _encoder.encode(value)
    sys.stdout.write(escaped_json(msgspec.json.format(encoded, indent=2).decode()) + "\n")


def fail(message: str, *, status: int = EXIT_FOUND) -> NoReturn:
    """Print *message* on standard error and exit with *status*."""
    typer.echo(message, err=True)
    raise typer.Exit(status)
