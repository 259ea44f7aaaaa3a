"""``closeout prune``: old runs go, with all that hangs on them."""

from contextlib import nullcontext
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from consumer.commands.durations import age
from consumer.commands.output import EXIT_USAGE, err, fail, print_json
from consumer.commands.session import database_words, in_words, settings_for
from consumer.errors import UnavailableError
from consumer.maintenance.prune import BATCH_RUNS, SAFE_AGE, Pruned, Scope, cutoff
from consumer.maintenance.prune import prune as remove
from consumer.postgres.engine import DATABASE_ERRORS, create_engine
from consumer.wording import counted


def prune(
    *,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Runs received longer ago than this: 90d.")],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's runs.")] = None,
    open_incidents: Annotated[
        bool, typer.Option("--open-incidents", help="Remove runs whose incident is still OPEN, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=5_000, help="Runs a transaction, at most.")] = BATCH_RUNS,
    force: Annotated[
        bool,
        typer.Option("--force", help=f"Allow an age below {SAFE_AGE.days}d: a repeated message is a new run then."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove old runs with their incidents, prevention records, evaluations, traces and rollbacks; live workers go on.

    A run goes whole or stays. It stays while events of it wait in the outbox,
    while its legacy close-out is unfinished, and while its incident is OPEN (but
    --open-incidents).

    A run that was removed is unknown again: if its message comes once more, from
    the parked queue, a runner or a backup, it is closed out as a new run, with a
    new incident and new events. Choose an age above all of those.

    Example: closeout prune --older-than 90d --dry-run
    """
    old = age("--older-than", older_than)
    if old < SAFE_AGE and not force:
        fail(
            f"--older-than: found {older_than}; expected {SAFE_AGE.days}d or more, for a message that comes again "
            "after its run was removed is closed out as a new run; --force if none can come",
            status=EXIT_USAGE,
        )
    settings = settings_for(need_amqp=False)
    columns = (TextColumn("looking" if dry_run else "pruning"), BarColumn(), TaskProgressColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, transient=True)
    task = progress.add_task("", total=None)
    report = Pruned()

    async def work() -> str | None:
        engine = create_engine(settings.database_url.get_secret_value(), pool_size=1, by_key=True)
        try:
            scope = Scope(await cutoff(engine, old), tenant, open_incidents, dry_run)
            await remove(
                engine, scope, report, batch=batch,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        except UnavailableError as error:
            return str(error)
        except DATABASE_ERRORS as error:
            return database_words(error)
        finally:
            await engine.dispose()
        return None

    with progress if err.is_terminal else nullcontext():
        failure = in_words(work())
    _print(report, dry_run=dry_run, failure=failure, as_json=as_json)
    if failure is not None:
        fail(f"stopped early: {failure}; what is reported above is done, run it again for the rest")


def _print(report: Pruned, *, dry_run: bool, failure: str | None, as_json: bool) -> None:
    kept = {
        "open_incident": report.open_incidents,
        "events_waiting": report.events_waiting,
        "unfinished": report.unfinished,
        "in_use": report.in_use,
    }
    if as_json:
        told = {"runs": report.runs, "rows": report.rows, "kept": kept}
        print_json({"dry_run": dry_run, **told, "complete": failure is None, "failure": failure})
        return
    rows = ", ".join(f"{table} {number:,}" for table, number in report.rows.items() if number)
    done = "would be removed" if dry_run else "removed"
    typer.echo(f"{counted(report.runs, 'run')} {done}" + (f": {rows}" if rows else ""))
    for name, number in kept.items():
        if number:
            typer.echo(f"{counted(number, 'stays', 'stay')}: {_WHY[name]}")


_WHY = {
    "open_incident": "incident OPEN (--open-incidents removes these too)",
    "events_waiting": "events not confirmed yet; see closeout outbox status",
    "unfinished": "legacy close-out unfinished; see closeout reconcile",
    "in_use": "held by somebody at that moment; the next prune takes what it can",
}
