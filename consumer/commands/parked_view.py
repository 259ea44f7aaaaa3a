"""Parked messages on a screen, in JSON and in a dump. They may hold anything; no terminal gets to act on it."""

import json
import os
import sys
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import msgspec
from aiormq import spec
from aiormq.abc import DeliveredMessage
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from consumer.commands.output import err, out
from consumer.parked.copies import headers_of
from consumer.parked.operations import Report
from consumer.parked.scan import Held, Parked
from consumer.wording import counted

# Characters of a body that a terminal is shown; --json has all of it.
_SHOWN_CHARACTERS = 20_000
# Bytes of a body that is no text, as hexadecimal; enough to tell what it is.
_SHOWN_BYTES = 1024
# Columns from which on a message has room on one line; below it has several.
_WIDE = 160
# Headers within headers; a sender may nest thousands, and what lies deeper is cut off.
_DEPTH = 16


def printable(text: str, *, keep: str = "") -> str:
    """Return *text* with all that a terminal might act on (controls, bidi marks, surrogates) escaped as in JSON."""
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def print_json(value: object) -> None:
    """Print *value* as one JSON document in ASCII."""
    sys.stdout.write(json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n")


def print_report(report: Report, done: str, *, as_json: bool) -> None:
    """Print what *report* says was *done*, and on standard error what was not."""
    if as_json:
        print_json(
            {
                "messages": [as_plain(message) for message in report.rows],
                "count": report.count,
                "by_reason": dict(report.reasons.most_common()),
                "left_untrusted": report.untrusted,
                "not_confirmed": report.failed,
                "failure": report.failure,
                "complete": report.failure is None and report.visited >= report.expected,
            }
        )
    else:
        print_table(report, done, to=out)


def warn(report: Report) -> bool:
    """Say on standard error what stood in the way; return whether anything did."""
    if report.untrusted:
        _say(f"{report.untrusted} of untrusted publishers stay: vouch for them with --reason untrusted_publisher")
    if report.failed and report.failure is None:
        _say(f"{report.failed} stay: they have headers that cannot be written again; see closeout parked show")
    elif report.failure is not None:
        _say(f"stopped early: {report.failure}; the rest is still parked")
    elif report.visited < report.expected:
        _say(f"only {report.visited} of {report.expected} could be looked at: somebody else is reading the queue")
    return bool(report.untrusted or report.failed or report.failure or report.visited < report.expected)


def print_table(report: Report, done: str, *, to: Console) -> None:
    """Print the first messages of *report* as a table, and all of them by reason."""
    if to.width < _WIDE:
        for message in report.rows:
            _print_record(message, to)
    else:
        _print_rows(report.rows, to)
    if report.count > len(report.rows):
        to.print(f"and {report.count - len(report.rows):,} more")
    reasons = ", ".join(f"{printable(reason)} {count:,}" for reason, count in report.reasons.most_common())
    to.print(Text(f"{report.count:,} {done}" + (f": {reasons}" if reasons else "")), soft_wrap=True)


def _print_record(message: Parked, to: Console) -> None:
    run, at, rest = _named(message)
    words = (f"{message.position}", at, *rest[:1], f"attempts {message.attempts}", counted(message.size, "byte"))
    to.print(Text(printable("  ".join(words))))
    # A message that its sender named by neither has no line for it.
    named = [run] if run != "-" else []
    named += [f"message id {rest[1]}"] if message.message_id else []
    for line in (*named, message.error):
        to.print(Padding(Text(printable(line)), (0, 0, 0, 3), expand=False))


def _print_rows(messages: Sequence[Parked], to: Console) -> None:
    names = (Column("parked at (UTC)", no_wrap=True), "reason", Column("run", overflow="fold"), "message id")
    table = Table(Column("#", justify="right"), *names, "attempts", Column("bytes", justify="right"), "error", box=None)
    for message in messages:
        run, at, (reason, message_id) = _named(message)
        cells = (reason, run, message_id, str(message.attempts), f"{message.size:,}", message.error)
        table.add_row(str(message.position), at, *(Text(printable(cell)) for cell in cells))
    if messages:
        to.print(table)


def _named(message: Parked) -> tuple[str, str, tuple[str, str]]:
    run = f"{message.tenant_id or '-'}/{message.run_id or '-'}" if message.tenant_id or message.run_id else "-"
    at = "-" if message.parked_at is None else f"{message.parked_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    return _cut(run), at, (message.reason or "-", _cut(message.message_id or "-", 64))


def as_plain(message: Parked) -> dict[str, Any]:
    """Return *message* as JSON has it."""
    plain = message._asdict()
    del plain["fingerprint"]
    plain["bytes"] = plain.pop("size")
    return {**plain, "parked_at": message.parked_at.isoformat() if message.parked_at else None}


def whole(parked: Parked, message: DeliveredMessage) -> dict[str, Any]:
    """Return all of a message as JSON has it; the body as text too, where it is text."""
    try:
        text = message.body.decode()
    except UnicodeDecodeError:
        text = None
    return {**as_plain(parked), **_envelope(message), "body": text, "body_base64": b64encode(message.body).decode()}


def print_whole(parked: Parked, message: DeliveredMessage) -> None:
    """Print all of a message: why it is here, its properties, its headers, its body."""
    envelope = _envelope(message)
    about = as_plain(parked)
    error = about.pop("error")
    out.print(Text(f"Parked message {parked.position}: {printable(parked.reason or 'without a reason')}", style="bold"))
    out.print(Text(printable(error)), soft_wrap=True)
    for title, values in (("message", about), ("properties", envelope["properties"]), ("headers", envelope["headers"])):
        out.print(Text(f"\n{title}", style="bold"))
        for name, value in values.items():
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.print(Text(f"  {printable(name):<24} {printable(words)}"), soft_wrap=True)
    out.print(Text("\nbody", style="bold"))
    out.print(Text(body_in_words(message.body)), soft_wrap=True)
    out.print()


def body_in_words(body: bytes) -> str:
    """Return *body* for a terminal: indented if it is JSON, escaped if it is text, else its first bytes in hex."""
    try:
        text = body.decode()
        msgspec.json.decode(body, type=msgspec.Raw)
        text = msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, RecursionError):
        text = body.decode()
    except UnicodeDecodeError:
        lines = [f"{at:08x}  {body[at : at + 16].hex(' ')}" for at in range(0, min(len(body), _SHOWN_BYTES), 16)]
        return "\n".join(lines) + _more(len(body) - _SHOWN_BYTES, "bytes")
    return printable(text[:_SHOWN_CHARACTERS], keep="\n") + _more(len(text) - _SHOWN_CHARACTERS, "characters")


def new_file(path: Path) -> IO[bytes]:
    """Create *path* for its owner only: it will hold tenants' data. Never overwrites an earlier dump."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def dump(file: IO[bytes], batch: Sequence[Held]) -> None:
    """Write *batch* as JSON Lines and return once it is on the disk."""
    for parked, message in batch:
        line = {**as_plain(parked), **_envelope(message), "body_base64": b64encode(message.body).decode()}
        file.write(json.dumps(line).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _envelope(message: DeliveredMessage) -> dict[str, Any]:
    properties = message.header.properties
    names = [name for name in spec.Basic.Properties.attributes() if name != "headers"]
    given = {name: _plain(getattr(properties, name)) for name in names if getattr(properties, name) not in {None, ""}}
    return {"properties": given, "headers": _plain(headers_of(message))}


def _plain(value: object, depth: int = 0) -> Any:  # noqa: ANN401 - whatever JSON can hold
    if depth > _DEPTH:
        return "…"
    if isinstance(value, dict):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, bytes | bytearray):
        return {"base64": b64encode(value).decode()}
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _cut(text: str, characters: int = 170) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _more(left: int, unit: str) -> str:
    return f"\n… and {left:,} more {unit} (--json has all)" if left > 0 else ""


def _say(words: str) -> None:
    err.print(Text(printable(words)), soft_wrap=True)
