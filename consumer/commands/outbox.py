"""Reports the outbox backlog, and publishes it."""

from dataclasses import asdict
from typing import Any

import typer
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.commands.durations import parse_duration
from consumer.commands.output import fail, out, print_hanging, print_json, print_line, progress_bar
from consumer.commands.session import run_to_end, settings_for, with_database
from consumer.metrics import Metrics
from consumer.outbox.backlog import Backlog, BacklogState, Share, describe_backlog, describe_set_aside, read_backlog
from consumer.outbox.drain import Drained, drain
from consumer.outbox.publisher import EventPublisher
from consumer.postgres.engine import create_engine
from consumer.wording import Progress, counted, format_seconds

# Tenants that are listed, those with the oldest events first; --json has all.
_LISTED = 20


def print_status(*, older_than: str, as_json: bool) -> None:
    """Print the outbox backlog; end with status 1 if events are stale or set aside."""
    seconds = parse_duration("--older-than", older_than).total_seconds()

    async def read(engine: AsyncEngine) -> Backlog:
        async with engine.connect() as conn:
            return await read_backlog(conn)

    found = with_database(read)
    state = found.state(seconds)
    if as_json:
        meaning, remedy = describe_backlog(state)
        print_json({"state": state, **asdict(found), "meaning": meaning, "remedy": remedy or None})
    else:
        _print(found, state)
    if state is BacklogState.STALE or found.set_aside:
        raise typer.Exit(1)


def drain_outbox(*, older_than: str | None, as_json: bool) -> None:
    """Publish the events in the outbox; end with status 1 if some were not published."""
    seconds = None if older_than is None else parse_duration("--older-than", older_than).total_seconds()
    settings = settings_for()

    async def work() -> Drained:
        engine = create_engine(settings.database_url.get_secret_value(), pool_size=1)
        try:
            return await drained_by(
                engine, settings, name="closeout outbox", older_than_seconds=seconds,
                progress=progress,
            )  # fmt: skip
        finally:
            await engine.dispose()

    with progress_bar("publishing runs' events") as progress:
        report = run_to_end(work())
    if as_json:
        print_json({"runs": report.runs, "events": report.events, "left": report.left, "reasons": report.reasons})
    else:
        of = f"{counted(report.events, 'event')} of {counted(report.runs, 'run')}"
        typer.echo(f"{of} published and confirmed" if report.runs or report.left else "the outbox is empty")
    if report.left:
        reason = report.failure or "workers have locked these runs and are publishing them"
        fail(f"{counted(report.left, 'run still has', 'runs still have')} unpublished events: {reason}")


async def drained_by(
    engine: AsyncEngine,
    settings: Settings,
    *,
    name: str,
    older_than_seconds: float | None,
    progress: Progress | None = None,
) -> Drained:
    """Drain the outbox over a connection called *name* to the broker in *settings*."""
    connection = BrokerConnection(settings.amqp_url.get_secret_value(), name=name)
    channel = ConfirmedChannel(connection)
    publisher = EventPublisher(channel, metrics=Metrics(), require_subscribers=settings.require_event_subscribers)
    try:
        return await drain(
            engine, publisher, reachable=channel.opened, older_than_seconds=older_than_seconds, progress=progress
        )
    finally:
        await connection.close()


def _print(found: Backlog, state: BacklogState) -> None:
    more = "" if found.complete else "at least "
    summary = "no unpublished events"
    if found.all.events:
        summary = f"{more}{counted(found.all.runs, 'run has', 'runs have')} "
        summary += f"{counted(found.all.events, 'unpublished event')}, the oldest for "
        summary += format_seconds(found.all.oldest_seconds)
    print_line(summary, "bold")
    _table("tenant", found.by_tenant)
    _table("event type", found.by_type)
    meaning, remedy = describe_backlog(state)
    print_hanging(
        Text("meaning: ", style={BacklogState.STALE: "red", BacklogState.LATE: "yellow"}.get(state, "")), meaning
    )
    if remedy:
        print_hanging("to do: ", remedy)
    for reason, number in found.set_aside.items():
        print_hanging(Text(f"set aside: {counted(number, 'run')}: ", style="red"), reason)
    if found.set_aside:
        print_hanging("to do: ", describe_set_aside())


def _table(title: str, shares: dict[str, Share]) -> None:
    if not shares:
        return
    numbers: list[Any] = [Column(name, justify="right", no_wrap=True) for name in ("runs", "events", "oldest")]
    table = Table(Column(title, overflow="fold"), *numbers, box=None, padding=(0, 2, 0, 0))
    for name, share in list(shares.items())[:_LISTED]:
        table.add_row(Text(name), f"{share.runs:,}", f"{share.events:,}", format_seconds(share.oldest_seconds))
    out.print(table)
    if len(shares) > _LISTED:
        out.print(f"and {len(shares) - _LISTED:,} more (--json has all)")
    out.print()
