"""Lists, shows, replays and discards parked messages."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import typer

from consumer.amqp.connection import BrokerConnection
from consumer.commands import parked_view as view
from consumer.commands.durations import parse_duration
from consumer.commands.output import EXIT_USAGE, err, fail, out, printable, progress_bar
from consumer.commands.session import run_to_end, settings_for
from consumer.contract.named_run import usual_spelling
from consumer.parked.operations import Filters, Report, discard, find, replay
from consumer.parked.scan import Held
from consumer.wording import Progress, counted

# Messages that are listed after a replay or discard; the others are only counted.
_ROWS = 50

_Work = Callable[[BrokerConnection, Progress], Awaitable[Report]]


def print_messages(filters: Filters, *, limit: int, as_json: bool) -> None:
    """List the messages that *filters* select, and count them by reason."""
    report = _run_with_progress("scanning", lambda c, p: find(c, filters, rows=limit, progress=p))
    _end(report, "parked", as_json=as_json)


def show_message(selector: str, *, limit: int, as_json: bool) -> None:
    """Print the messages that *selector* names; exit with status 1 if no message matches."""
    held: list[Held] = []
    filters = Filters(selector=_run_name(selector))
    report = _run_with_progress("scanning", lambda c, p: find(c, filters, rows=limit, progress=p, bodies=held))
    if not held:
        fail(f"no parked message with position, message_id or run {printable(selector)}")
    if as_json:
        view.print_json([view.complete(*each) for each in held])
    else:
        for each in held:
            view.print_complete(*each)
        if report.count > len(held):
            out.print(f"and {report.count - len(held)} more that match (--limit)")
    if view.warn(report):
        raise typer.Exit(1)


def replay_messages(
    filters: Filters, *, limit: int | None, exchanges: Sequence[str], dry_run: bool, as_json: bool
) -> None:
    """Publish the selected messages to where they came from; end with status 1 if some were not."""
    report = _run_with_progress(
        "replaying",
        lambda c, p: replay(
            c, filters, rows=_ROWS, limit=limit, exchanges=frozenset(exchanges), dry_run=dry_run, progress=p
        ),
    )
    _end(report, "would be replayed" if dry_run else "replayed and confirmed", as_json=as_json)


def discard_messages(
    filters: Filters,
    *,
    limit: int | None,
    everything: bool,
    yes: bool,
    dump_to: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete the selected messages after a confirmation; exit with status 2 if there is no terminal to ask on."""
    if not filters and not everything:
        fail("no filter is given; select messages with a filter, or all of them with --all", status=EXIT_USAGE)
    needs_confirmation = not yes and not dry_run
    if needs_confirmation and not sys.stdin.isatty():
        fail("discarding cannot be undone, and there is no terminal to confirm it; use --yes", status=EXIT_USAGE)
    only = None
    if dry_run or needs_confirmation:
        found = _run_with_progress("scanning", lambda c, p: find(c, filters, rows=_ROWS, limit=limit, progress=p))
        if dry_run:
            _end(found, "would be discarded", as_json=as_json)
            return
        view.print_table(found, "would be discarded", to=err)
        if not found.count or not typer.confirm(f"Discard {counted(found.count, 'message')} permanently?", err=True):
            fail("nothing was discarded", status=1 if found.count else 0)
        only = found.fingerprints  # messages parked meanwhile are kept
    try:
        target = view.new_file(dump_to) if dump_to else nullcontext()
    except OSError as error:
        fail(f"--dump: {error}", status=EXIT_USAGE)
    with target as file:
        write = partial(view.dump, file) if file else None
        report = _run_with_progress(
            "discarding",
            lambda c, p: discard(c, filters, rows=_ROWS, limit=limit, only=only, dump=write, progress=p),
        )
    _end(report, "discarded", as_json=as_json)


def _end(report: Report, done: str, *, as_json: bool) -> None:
    view.print_report(report, done, as_json=as_json)
    if view.warn(report):
        raise typer.Exit(1)


def _run_with_progress(title: str, work: _Work) -> Report:
    settings = settings_for(need_database=False)

    async def run() -> Report:
        connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout parked")
        try:
            return await work(connection, progress)
        finally:
            await connection.close()

    with progress_bar(title) as progress:
        return run_to_end(run())


def filters_from(  # noqa: PLR0917 - in the order of the options
    reason: str | None,
    tenant: str | None,
    run: str | None,
    message_id: str | None,
    older_than: str | None,
    newer_than: str | None,
) -> Filters:
    """Return the filters that the options of the command line describe; end with status 2 if one is invalid."""
    return Filters(
        reason=reason,
        tenant=tenant,
        run=_run_name(run, bare=usual_spelling) if run else None,
        message_id=message_id,
        parked_before=_ago("--older-than", older_than),
        parked_after=_ago("--newer-than", newer_than),
    )


def _run_name(name: str, *, bare: Callable[[str], str] = str) -> str:
    owner, slash, run = name.partition("/")
    return f"{owner}/{usual_spelling(run)}" if slash else bare(name)


def _ago(option: str, text: str | None) -> datetime | None:
    return None if text is None else datetime.now(UTC) - parse_duration(option, text)
