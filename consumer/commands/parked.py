"""``closeout parked``: seeing what was parked, sending it back, throwing it away."""

import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from consumer.amqp.connection import BrokerConnection
from consumer.commands import parked_view as screen
from consumer.commands.durations import age
from consumer.commands.output import EXIT_USAGE, err, fail, out
from consumer.commands.session import in_words, settings_for
from consumer.commands.typer_app import Application
from consumer.contract.refusals import ParkReason
from consumer.parked.operations import Filters, Report, discard, look, replay
from consumer.parked.scan import Held
from consumer.wording import counted

app = Application(help="Look at parked messages, send them back, throw them away.", no_args_is_help=True)
# Messages that are named after a replay or discard; the others are counted.
_NAMED = 50

_Reason = Annotated[ParkReason | None, typer.Option(help="Only those parked for this reason.")]
_Tenant = Annotated[str | None, typer.Option(help="Only this tenant's, as far as bodies can be read.")]
_Run = Annotated[str | None, typer.Option(help="Only this run: RUN_ID or TENANT/RUN_ID.")]
_MessageId = Annotated[str | None, typer.Option(help="Only those with this message_id.")]
_Older = Annotated[str | None, typer.Option(metavar="TIME", help="Parked longer ago than 90s, 30m, 2h, 7d.")]
_Newer = Annotated[str | None, typer.Option(metavar="TIME", help="Parked since 90s, 30m, 2h, 7d.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="At most so many, oldest first.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Work = Callable[[BrokerConnection, Callable[[int, int], None]], Awaitable[Report]]


@app.command("list")
def list_(
    *,
    reason: _Reason = None,
    tenant: _Tenant = None,
    run: _Run = None,
    message_id: _MessageId = None,
    older_than: _Older = None,
    newer_than: _Newer = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows, oldest first; all are counted.")] = 20,
    as_json: _Json = False,
) -> None:
    """List parked messages, oldest first, and count them by reason. Nothing is changed.

    Example: closeout parked list --reason conflicting_duplicate --newer-than 2h
    """
    filters = _filters(
        reason=reason, tenant=tenant, run=run, message_id=message_id, older_than=older_than, newer_than=newer_than
    )
    report = _run_with_progress("looking", lambda c, p: look(c, filters, rows=limit, progress=p))
    _end(report, "parked", as_json=as_json)


@app.command()
def show(
    selector: Annotated[str, typer.Argument(help="A position in the list, a message_id, a run or TENANT/RUN.")],
    *,
    limit: Annotated[int, typer.Option(min=1, max=20, help="Messages to show, if several match.")] = 5,
    as_json: _Json = False,
) -> None:
    """Show a parked message whole: why it was parked, properties, headers and body.

    Example: closeout parked show 3
    """
    held: list[Held] = []
    filters = Filters(selector=_run_name(selector))
    report = _run_with_progress("looking", lambda c, p: look(c, filters, rows=limit, progress=p, bodies=held))
    if not held:
        fail(f"no parked message has the position, message_id or run {screen.printable(selector)}")
    if as_json:
        screen.print_json([screen.whole(*each) for each in held])
    else:
        for each in held:
            screen.print_whole(*each)
        if report.count > len(held):
            out.print(f"and {report.count - len(held)} more of that name (--limit)")
    if screen.warn(report):
        raise typer.Exit(1)


@app.command("replay")
def replay_(
    *,
    reason: _Reason = None,
    tenant: _Tenant = None,
    run: _Run = None,
    message_id: _MessageId = None,
    older_than: _Older = None,
    newer_than: _Newer = None,
    limit: _Limit = None,
    exchange: Annotated[
        list[str] | None, typer.Option(help="Besides runs, send back to this exchange what says it came from there.")
    ] = None,
    dry_run: _DryRun = False,
    as_json: _Json = False,
) -> None:
    """Send parked messages back to where they came from, once the cause is mended; their attempts start anew.

    Each is removed only after RabbitMQ confirmed its copy; a crash in between
    leaves both, and a run is closed out once. You vouch for what you send back:
    messages of untrusted publishers go only with --reason untrusted_publisher.

    Example: closeout parked replay --reason attempts_exhausted --dry-run
    """
    filters = _filters(
        reason=reason, tenant=tenant, run=run, message_id=message_id, older_than=older_than, newer_than=newer_than
    )
    report = _run_with_progress(
        "replaying",
        lambda c, p: replay(
            c, filters, rows=_NAMED, limit=limit, exchanges=frozenset(exchange or ()), dry_run=dry_run, progress=p
        ),
    )
    _end(report, "would be sent back" if dry_run else "sent back and confirmed", as_json=as_json)


@app.command("discard")
def discard_(
    *,
    reason: _Reason = None,
    tenant: _Tenant = None,
    run: _Run = None,
    message_id: _MessageId = None,
    older_than: _Older = None,
    newer_than: _Newer = None,
    limit: _Limit = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, where no filter is given.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="FILE", help="Write them to a new file of JSON Lines.")] = None,
    dry_run: _DryRun = False,
    as_json: _Json = False,
) -> None:
    """Throw parked messages away, for good. Needs a filter or --all, and asks first; elsewhere it needs --yes.

    --dump writes each to disk (headers, properties, body in base64) before it is
    removed.

    Example: closeout parked discard --reason invalid_json --dump discarded.jsonl
    """
    filters = _filters(
        reason=reason, tenant=tenant, run=run, message_id=message_id, older_than=older_than, newer_than=newer_than
    )
    if not filters and not everything:
        fail("name what to discard by a filter, or everything with --all", status=EXIT_USAGE)
    asks = not yes and not dry_run
    if asks and not sys.stdin.isatty():
        fail("discarding cannot be undone: there is no terminal to ask on, so say --yes", status=EXIT_USAGE)
    only = None
    if dry_run or asks:
        found = _run_with_progress("looking", lambda c, p: look(c, filters, rows=_NAMED, limit=limit, progress=p))
        if dry_run:
            _end(found, "would be discarded", as_json=as_json)
            return
        screen.print_table(found, "would be discarded", to=err)
        if not found.count or not typer.confirm(f"Discard {counted(found.count, 'message')} for good?", err=True):
            fail("nothing was discarded", status=1 if found.count else 0)
        only = found.fingerprints  # what was parked meanwhile stays
    try:
        target = screen.new_file(dump) if dump else nullcontext()
    except OSError as error:
        fail(f"--dump: {error}", status=EXIT_USAGE)
    with target as file:
        write = partial(screen.dump, file) if file else None
        report = _run_with_progress(
            "discarding",
            lambda c, p: discard(c, filters, rows=_NAMED, limit=limit, only=only, dump=write, progress=p),
        )
    _end(report, "discarded", as_json=as_json)


def _end(report: Report, done: str, *, as_json: bool) -> None:
    screen.print_report(report, done, as_json=as_json)
    if screen.warn(report):
        raise typer.Exit(1)


def _run_with_progress(words: str, work: _Work) -> Report:
    settings = settings_for(need_database=False)
    progress = Progress(
        TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err, transient=True
    )
    task = progress.add_task(words, total=None)

    async def run() -> Report:
        connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout parked")
        try:
            return await work(connection, lambda done, total: progress.update(task, completed=done, total=total))
        finally:
            await connection.close()

    with progress if err.is_terminal else nullcontext():
        return in_words(run())


def _filters(
    *,
    reason: str | None,
    tenant: str | None,
    run: str | None,
    message_id: str | None,
    older_than: str | None,
    newer_than: str | None,
) -> Filters:
    return Filters(
        reason=reason,
        tenant=tenant,
        run=_run_name(run, bare=str.lower) if run else None,
        message_id=message_id,
        parked_before=_ago("--older-than", older_than),
        parked_after=_ago("--newer-than", newer_than),
    )


def _run_name(name: str, *, bare: Callable[[str], str] = str) -> str:
    owner, slash, run = name.rpartition("/")
    return f"{owner}/{run.lower()}" if slash else bare(name)


def _ago(option: str, words: str | None) -> datetime | None:
    return None if words is None else datetime.now(UTC) - age(option, words)
