"""Publishes run-completed messages from a JSON Lines file, with publisher confirms and the mandatory flag."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import msgspec
import typer
from aiormq import spec
from pamqp.common import FieldTable

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.commands.output import EXIT_USAGE, fail, print_json, printable, progress_bar
from consumer.commands.session import settings_for
from consumer.contract.names import PERSISTENT, RUN_COMPLETED_KEY, RUN_CONTENT_TYPE, RUNS_EXCHANGE
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import decode
from consumer.contract.trace_context import TRACEPARENT, valid_traceparent
from consumer.errors import UnavailableError, one_line

# Messages in flight: a quorum queue confirms in groups, and waiting for each would be 10 times slower.
_WINDOW = 200
# Refused lines that are reported one by one.
_REPORTED_FAULTS = 20
_TRACEPARENT_FORM = "00-TRACE-SPAN-FLAGS with 32, 16 and 2 hexadecimal digits, trace and span not all 0"


def publish_file(file: Path, *, raw: bool, traceparent: str | None, as_json: bool) -> None:
    """Publish each line of *file*; end with status 1 if one was refused or not confirmed."""
    settings = settings_for(need_database=False)
    headers: FieldTable | None = None
    if traceparent is not None:
        if valid_traceparent(traceparent) is None:
            fail(f"--traceparent: found {traceparent!r}; expected {_TRACEPARENT_FORM}", status=EXIT_USAGE)
        headers = {TRACEPARENT: traceparent}
    amqp_url = settings.amqp_url.get_secret_value()
    with _opened(file) as lines:
        counts, failure = asyncio.run(_publish(lines, amqp_url, settings.message_max_bytes, raw=raw, headers=headers))
    if as_json:
        print_json({**counts, "failure": failure})
    elif failure is None:
        typer.echo(f"{counts['published']} published and confirmed, {counts['refused']} refused")
    if failure is not None:
        fail(f"{counts['published']} published and confirmed, then: {failure}")
    if counts["refused"]:
        raise typer.Exit(1)


def check_file(file: Path, *, as_json: bool) -> None:
    """Print for each line of *file* whether a worker would accept it; end with status 1 if it would park one."""
    max_bytes = settings_for(need_amqp=False, need_database=False).message_max_bytes
    counts = {"accepted": 0, "adjusted": 0, "refused": 0}
    checked: list[dict[str, Any]] = []
    with _opened(file) as lines:
        try:
            for number, body in _messages(lines):
                line = _checked(number, body, max_bytes)
                counts[line["result"]] += 1
                if as_json:
                    checked.append(line)
                else:
                    _print_checked(line)
        except OSError as error:
            fail(f"FILE: read failed: {one_line(error)}")
    if as_json:
        print_json({**counts, "lines": checked})
    else:
        accepted = counts["accepted"] + counts["adjusted"]
        typer.echo(f"{accepted} accepted ({counts['adjusted']} with adjustments), {counts['refused']} refused")
    if counts["refused"]:
        raise typer.Exit(1)


def _checked(number: int, body: bytes, max_bytes: int) -> dict[str, Any]:
    try:
        found = decode(body, max_bytes=max_bytes)
    except MessageRefusedError as error:
        return {"line": number, "result": "refused", "reason": error.reason, "error": str(error)}
    if not found.adjustments:
        return {"line": number, "result": "accepted"}
    return {"line": number, "result": "adjusted", "adjustments": msgspec.to_builtins(found.adjustments)}


def _print_checked(line: dict[str, Any]) -> None:
    text = f"line {line['line']}: {line['result'] if line['result'] != 'adjusted' else 'accepted, with adjustments'}"
    typer.echo(printable(f"{text}: {line['reason']}: {line['error']}" if "reason" in line else text))
    for one in line.get("adjustments", ()):
        stored = "null" if one["stored"] is None else one["stored"]
        typer.echo(printable(f"  {one['field']}: found {one['found']}; stored {stored}"))


def _opened(file: Path) -> AbstractContextManager[IO[bytes]]:
    """Open *file*, or standard input for ``-``; end with status 2 if it cannot be read."""
    if str(file) == "-":
        return nullcontext(sys.stdin.buffer)
    if not file.is_file():
        fail(f"FILE: {file} is not a file", status=EXIT_USAGE)
    try:
        return file.open("rb")
    except OSError as error:
        fail(f"FILE: cannot read {file}: {error.strerror}", status=EXIT_USAGE)


async def _publish(
    lines: IO[bytes], amqp_url: str, max_bytes: int, *, raw: bool, headers: FieldTable | None
) -> tuple[dict[str, int], str | None]:
    """Return how many were published and refused, and the failure that ended it early, if any."""
    counts, failure = {"published": 0, "refused": 0}, None
    connection = BrokerConnection(amqp_url, name="closeout publish")
    channel = ConfirmedChannel(connection)
    window = asyncio.Semaphore(_WINDOW)

    async def send(body: bytes) -> None:
        try:
            await channel.send(
                exchange=RUNS_EXCHANGE,
                routing_key=RUN_COMPLETED_KEY,
                body=body,
                properties=spec.Basic.Properties(
                    content_type=RUN_CONTENT_TYPE, delivery_mode=PERSISTENT, headers=headers
                ),
            )
        finally:
            window.release()
        counts["published"] += 1
        report(counts["published"], 0)

    try:
        with progress_bar("publishing") as report:
            async with asyncio.TaskGroup() as group:
                for number, body in _messages(lines):
                    fault = None if raw else _fault_in(body, max_bytes)
                    if fault:
                        counts["refused"] += 1
                        if counts["refused"] <= _REPORTED_FAULTS:
                            typer.echo(f"line {number}: {fault}", err=True)
                        continue
                    await window.acquire()
                    group.create_task(send(body))
    except* UnavailableError as outage:
        failure = str(outage.exceptions[0])
    except* OSError as unreadable:
        failure = f"FILE: read failed: {one_line(unreadable.exceptions[0])}"
    finally:
        await connection.close()
    return counts, failure


def _messages(lines: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, start=1):
        body = line.strip()
        if body:
            yield number, body


def _fault_in(body: bytes, max_bytes: int) -> str | None:
    try:
        decode(body, max_bytes=max_bytes)
    except MessageRefusedError as error:
        return f"{error.reason}: {error}"
    return None
