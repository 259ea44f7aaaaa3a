"""Formats parked messages for a terminal, as JSON and as a dump. Their content is untrusted, and is escaped."""

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

from consumer.commands.output import err, out, printable
from consumer.parked.copies import headers_of
from consumer.parked.operations import Report
from consumer.parked.scan import Held, Parked
from consumer.wording import counted

# Characters of a body on a terminal; --json has all of it.
_BODY_CHARACTERS = 20_000
# Bytes of a binary body that are printed as hexadecimal.
_BODY_BYTES = 1024
# Terminal columns from which a message fits on one line; below it takes several.
_WIDE = 160
# Nesting of headers that is printed; a sender may nest thousands.
_DEPTH = 16


def print_json(value: object) -> None:
    """Print *value* as one JSON document in ASCII."""
    sys.stdout.write(json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n")


def print_report(report: Report, done: str, *, as_json: bool) -> None:
    """Print *report*; *done* describes what was done with its messages."""
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
    """Print on standard error what was not done and why; return whether there was anything."""
    if report.untrusted:
        _warn(f"{report.untrusted} of untrusted publishers kept: to replay them, use --reason untrusted_publisher")
    if report.failed and report.failure is None:
        _warn(f"{report.failed} kept: their headers cannot be written again; see closeout parked show")
    elif report.failure is not None:
        _warn(f"stopped early: {report.failure}; the rest is still parked")
    elif report.visited < report.expected:
        _warn(f"only {report.visited} of {report.expected} could be read: another consumer is reading the queue")
    return bool(report.untrusted or report.failed or report.failure or report.visited < report.expected)


def print_table(report: Report, done: str, *, to: Console) -> None:
    """Print the first messages of *report* as a table, and the counts by reason."""
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
    cells = (f"{message.position}", at, *rest[:1], f"attempts {message.attempts}", counted(message.size, "byte"))
    to.print(Text(printable("  ".join(cells))))
    # Run and message id are optional.
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
    """Return *message* as plain values for JSON."""
    plain = message._asdict()
    del plain["fingerprint"]
    plain["bytes"] = plain.pop("size")
    return {**plain, "parked_at": message.parked_at.isoformat() if message.parked_at else None}


def complete(parked: Parked, message: DeliveredMessage) -> dict[str, Any]:
    """Return the complete message as plain values for JSON, with the body also as text if it is text."""
    try:
        text = message.body.decode()
    except UnicodeDecodeError:
        text = None
    return {**as_plain(parked), **_envelope(message), "body": text, "body_base64": b64encode(message.body).decode()}


def print_complete(parked: Parked, message: DeliveredMessage) -> None:
    """Print the complete message: reason, error, properties, headers and body."""
    envelope = _envelope(message)
    about = as_plain(parked)
    error = about.pop("error")
    out.print(Text(f"Parked message {parked.position}: {printable(parked.reason or 'no reason')}", style="bold"))
    out.print(Text(printable(error)), soft_wrap=True)
    for title, values in (("message", about), ("properties", envelope["properties"]), ("headers", envelope["headers"])):
        out.print(Text(f"\n{title}", style="bold"))
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.print(Text(f"  {printable(name):<24} {printable(text)}"), soft_wrap=True)
    out.print(Text("\nbody", style="bold"))
    out.print(Text(format_body(message.body)), soft_wrap=True)
    out.print()


def format_body(body: bytes) -> str:
    """Return *body* for a terminal: indented JSON, escaped text, or else its first bytes as hexadecimal."""
    try:
        text = body.decode()
        msgspec.json.decode(body, type=msgspec.Raw)
        text = msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, RecursionError):
        text = body.decode()
    except UnicodeDecodeError:
        lines = [f"{at:08x}  {body[at : at + 16].hex(' ')}" for at in range(0, min(len(body), _BODY_BYTES), 16)]
        return "\n".join(lines) + _more(len(body) - _BODY_BYTES, "bytes")
    return printable(text[:_BODY_CHARACTERS], keep="\n") + _more(len(text) - _BODY_CHARACTERS, "characters")


def new_file(path: Path) -> IO[bytes]:
    """Create *path*, readable only by its owner because it holds tenants' data. Never overwrites a file."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def dump(file: IO[bytes], batch: Sequence[Held]) -> None:
    """Write *batch* as JSON Lines; return once it is on disk."""
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


def _warn(message: str) -> None:
    err.print(Text(printable(message)), soft_wrap=True)
