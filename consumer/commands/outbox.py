"""``closeout outbox``: what waits to be published, and publishing it now."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.commands.durations import age
from consumer.commands.output import err, fail, hanging, out, print_json, say
from consumer.commands.session import in_words, settings_for, with_database
from consumer.commands.typer_app import Application
from consumer.metrics import Metrics
from consumer.outbox.backlog import Backlog, BacklogState, Share, describe_backlog, read_backlog
from consumer.outbox.drain import Drained, drain
from consumer.outbox.publisher import EventPublisher
from consumer.postgres.engine import create_engine
from consumer.wording import counted, spoken

app = Application(help="Events that are committed and not yet confirmed by RabbitMQ.", no_args_is_help=True)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# Tenants that are listed, those with the oldest events first; --json has all.
_LISTED = 20


@app.command()
def status(
    *,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="What is stale: 90s, 5m, 2h, 1d.")] = "1m",
    as_json: _Json = False,
) -> None:
    """Say how many runs have events waiting, for how long, whose and of which types. Exit 1 if any are stale.

    Example: closeout outbox status
    """
    seconds = age("--older-than", older_than).total_seconds()

    async def look(engine: AsyncEngine) -> Backlog:
        async with engine.connect() as conn:
            return await read_backlog(conn)

    found = with_database(look)
    state = found.state(seconds)
    if as_json:
        meaning, remedy = describe_backlog(state)
        print_json({"state": state, **asdict(found), "meaning": meaning, "remedy": remedy or None})
    else:
        _print(found, state)
    if state is BacklogState.STALE:
        raise typer.Exit(1)


@app.command("drain")
def drain_(
    *,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only what has waited longer than 0s, 90s, 5m, 2h, 1d.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Publish now what the outbox holds, each event confirmed before it is removed. Exit 1 if some could not be.

    Safe beside live workers: what their relays hold is passed over, a run's
    events keep their order and their ids. What is younger than 11 s may be on its
    way, so it is given that time; --older-than 0s takes it at once, and
    subscribers may get it twice, under one id.

    Example: closeout outbox drain --older-than 5m
    """
    seconds = None if older_than is None else age("--older-than", older_than).total_seconds()
    settings = settings_for()
    progress = Progress(
        TextColumn("publishing runs' events"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=err, transient=True,
    )  # fmt: skip
    task = progress.add_task("", total=None)

    async def work() -> Drained:
        engine = create_engine(settings.database_url.get_secret_value(), pool_size=1)
        try:
            return await drained_by(
                engine, settings, name="closeout outbox", older_than_seconds=seconds,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        finally:
            await engine.dispose()

    with progress if err.is_terminal else nullcontext():
        report = in_words(work())
    if as_json:
        print_json({"runs": report.runs, "events": report.events, "left": report.left, "reasons": report.reasons})
    else:
        of = f"{counted(report.events, 'event')} of {counted(report.runs, 'run')}"
        typer.echo(f"{of} published and confirmed" if report.runs or report.left else "nothing waits in the outbox")
    if report.left:
        reason = report.failure or "workers hold them and publish them themselves"
        fail(f"{counted(report.left, 'run still has', 'runs still have')} events waiting: {reason}")


async def drained_by(
    engine: AsyncEngine,
    settings: Settings,
    *,
    name: str,
    older_than_seconds: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> Drained:
    """Drain the outbox over a connection of that *name* to the broker that *settings* name."""
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
    told = "no events wait"
    if found.all.events:
        told = f"{more}{counted(found.all.runs, 'run has', 'runs have')} {counted(found.all.events, 'event')} waiting"
        told += f", the oldest for {spoken(found.all.oldest_seconds)}"
    say(told, "bold")
    _table("tenant", found.by_tenant)
    _table("type of event", found.by_type)
    meaning, remedy = describe_backlog(state)
    hanging(Text("it means: ", style={BacklogState.STALE: "red", BacklogState.LATE: "yellow"}.get(state, "")), meaning)
    if remedy:
        hanging("to do: ", remedy)


def _table(title: str, shares: dict[str, Share]) -> None:
    if not shares:
        return
    numbers: list[Any] = [Column(name, justify="right", no_wrap=True) for name in ("runs", "events", "oldest")]
    table = Table(Column(title, overflow="fold"), *numbers, box=None, padding=(0, 2, 0, 0))
    for name, share in list(shares.items())[:_LISTED]:
        table.add_row(Text(name), f"{share.runs:,}", f"{share.events:,}", spoken(share.oldest_seconds))
    out.print(table)
    if len(shares) > _LISTED:
        out.print(f"and {len(shares) - _LISTED:,} more (--json has all)")
    out.print()
