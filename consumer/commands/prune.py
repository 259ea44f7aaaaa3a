"""Removes old runs with everything that belongs to them."""

import typer

from consumer.commands.durations import parse_duration
from consumer.commands.output import EXIT_USAGE, fail, print_json, progress_bar
from consumer.commands.session import describe_database_error, run_to_end, settings_for
from consumer.errors import UnavailableError
from consumer.maintenance.limits import SAFE_AGE
from consumer.maintenance.prune import Pruned, Scope, cutoff
from consumer.maintenance.prune import prune as remove
from consumer.postgres.engine import DATABASE_ERRORS, create_engine
from consumer.wording import counted


def run_prune(
    *,
    older_than: str,
    tenant: str | None,
    open_incidents: bool,
    dry_run: bool,
    batch: int,
    force: bool,
    as_json: bool,
) -> None:
    """Remove old runs, or with *dry_run* count them; exit with status 1 if it stops early."""
    age = parse_duration("--older-than", older_than)
    if age < SAFE_AGE and not force:
        fail(
            f"--older-than: found {older_than}; expected {SAFE_AGE.days}d or more, because a message that arrives "
            "again after its run was removed is closed out as a new run; use --force if none can arrive",
            status=EXIT_USAGE,
        )
    settings = settings_for(need_amqp=False)
    report = Pruned()

    async def work() -> str | None:
        engine = create_engine(settings.database_url.get_secret_value(), pool_size=1, by_key=True)
        try:
            scope = Scope(await cutoff(engine, age), tenant, open_incidents, dry_run)
            await remove(
                engine, scope, report, batch=batch,
                progress=progress,
            )  # fmt: skip
        except UnavailableError as error:
            return str(error)
        except DATABASE_ERRORS as error:
            return describe_database_error(error)
        finally:
            await engine.dispose()
        return None

    with progress_bar("scanning" if dry_run else "pruning", estimate=True) as progress:
        failure = run_to_end(work())
    _print(report, dry_run=dry_run, failure=failure, as_json=as_json)
    if failure is not None:
        fail(f"stopped early: {failure}; the runs reported above are done, run it again for the rest")


def _print(report: Pruned, *, dry_run: bool, failure: str | None, as_json: bool) -> None:
    kept = {
        "open_incident": report.open_incidents,
        "events_waiting": report.events_waiting,
        "unfinished": report.unfinished,
        "in_use": report.in_use,
    }
    if as_json:
        counts = {"runs": report.runs, "rows": report.rows, "kept": kept}
        print_json({"dry_run": dry_run, **counts, "complete": failure is None, "failure": failure})
        return
    rows = ", ".join(f"{table} {number:,}" for table, number in report.rows.items() if number)
    done = "would be removed" if dry_run else "removed"
    typer.echo(f"{counted(report.runs, 'run')} {done}" + (f": {rows}" if rows else ""))
    for name, number in kept.items():
        if number:
            typer.echo(f"{counted(number, 'run')} kept: {_KEPT[name]}")


_KEPT = {
    "open_incident": "incident OPEN (--open-incidents removes these)",
    "events_waiting": "unpublished events; see closeout outbox status",
    "unfinished": "legacy close-out unfinished; see closeout reconcile",
    "in_use": "locked by another session; run prune again",
}
