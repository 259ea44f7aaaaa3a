"""``closeout publish``: run-completed messages from a file of JSON Lines, confirmed and mandatory."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Annotated

import typer
from aiormq import spec
from pamqp.common import FieldTable
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.commands.output import EXIT_USAGE, err, fail, print_json
from consumer.commands.session import settings_for
from consumer.contract.names import PERSISTENT, RUN_COMPLETED_KEY, RUNS_EXCHANGE
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import CONTENT_TYPE, decode
from consumer.contract.trace_context import TRACEPARENT, valid_traceparent
from consumer.errors import UnavailableError, one_line

# Messages on their way at once: a quorum queue confirms in groups, waiting for each would be 10 times slower.
_WINDOW = 200
# Faulty lines that are named one by one.
_NAMED_FAULTS = 20
_TRACEPARENT_WORDS = "00, 32 and 16 hexadecimal digits and two of flags, with - between and not all 0"


def publish(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines, one message a line; - is standard input.")],
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Publish every line as it is, valid or not.")] = False,
    traceparent: Annotated[
        str | None, typer.Option(metavar="W3C", help="Send each message with this traceparent: 00-TRACE-SPAN-FLAGS.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Publish run-completed messages and wait for the broker's confirm of each.

    A line that breaks the contract is named and not published (--raw publishes it
    all the same); the others are. Exit 1 if any line was refused or not
    confirmed. Publishing a file twice is harmless: runs are closed out once.

    Example: closeout publish runs.jsonl
    """
    settings = settings_for(need_database=False)
    if str(file) != "-" and not file.is_file():
        fail(f"FILE: {file} is not a file", status=EXIT_USAGE)
    headers: FieldTable | None = None
    if traceparent is not None:
        if valid_traceparent(traceparent) is None:
            fail(f"--traceparent: found {traceparent!r}; expected {_TRACEPARENT_WORDS}", status=EXIT_USAGE)
        headers = {TRACEPARENT: traceparent}
    amqp_url = settings.amqp_url.get_secret_value()
    try:
        source = nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb")
    except OSError as error:
        fail(f"FILE: cannot read {file}: {error.strerror}", status=EXIT_USAGE)
    with source as lines:
        counts, failure = asyncio.run(_publish(lines, amqp_url, settings.message_max_bytes, raw=raw, headers=headers))
    if as_json:
        print_json({**counts, "failure": failure})
    elif failure is None:
        typer.echo(f"{counts['published']} published and confirmed, {counts['refused']} refused")
    if failure is not None:
        fail(f"{counts['published']} published and confirmed, then: {failure}")
    if counts["refused"]:
        raise typer.Exit(1)


async def _publish(
    lines: IO[bytes], amqp_url: str, max_bytes: int, *, raw: bool, headers: FieldTable | None
) -> tuple[dict[str, int], str | None]:
    """Return how many were published and refused, and what ended it early, if anything did."""
    counts, failure = {"published": 0, "refused": 0}, None
    connection = BrokerConnection(amqp_url, name="closeout publish")
    channel = ConfirmedChannel(connection)
    window = asyncio.Semaphore(_WINDOW)
    progress = Progress(
        TextColumn("publishing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )

    async def send(body: bytes) -> None:
        try:
            await channel.send(
                exchange=RUNS_EXCHANGE,
                routing_key=RUN_COMPLETED_KEY,
                body=body,
                properties=spec.Basic.Properties(content_type=CONTENT_TYPE, delivery_mode=PERSISTENT, headers=headers),
            )
        finally:
            window.release()
        counts["published"] += 1
        progress.advance(shown)

    try:
        with progress if err.is_terminal else nullcontext():
            shown = progress.add_task("publishing", total=None)
            async with asyncio.TaskGroup() as group:
                for number, body in _messages(lines):
                    fault = None if raw else _fault_in(body, max_bytes)
                    if fault:
                        counts["refused"] += 1
                        if counts["refused"] <= _NAMED_FAULTS:
                            typer.echo(f"line {number}: {fault}", err=True)
                        continue
                    await window.acquire()
                    group.create_task(send(body))
    except* UnavailableError as away:
        failure = str(away.exceptions[0])
    except* OSError as unreadable:
        failure = f"FILE: cannot be read on: {one_line(unreadable.exceptions[0])}"
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
