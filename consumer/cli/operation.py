"""Running Closeout: the worker, publishing, reconciling and pruning."""

from pathlib import Path
from typing import Annotated

import typer

from consumer.cli.options import DryRun, Json, Since, Tenant
from consumer.maintenance.limits import BATCH_RUNS, SAFE_AGE


def worker() -> None:
    """Consume run-completed messages until SIGTERM or SIGINT, then drain and exit 0.

    Needs DATABASE_URL and AMQP_URL, a migrated schema (closeout migrate) and a
    declared topology (closeout topology). While one of them is missing it waits,
    and /readyz reports which. The console is at / of HTTP_HOST and HTTP_PORT.

    Example: TRANSACTION_COORDINATOR_ENABLED=true closeout worker
    """
    from consumer.commands.worker import run_worker

    run_worker()


def publish(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON Lines, one message per line; - is standard input.")
    ],
    *,
    check: Annotated[
        bool,
        typer.Option("--check", metavar="", help="Publish nothing; print whether a worker would accept each line."),
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", metavar="", help="Publish every line unchecked.")] = False,
    traceparent: Annotated[
        str | None, typer.Option(metavar="W3C", help="Send each message with this traceparent: 00-TRACE-SPAN-FLAGS.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish run-completed messages and wait for the broker's confirm of each.

    An invalid line is reported and not published (--raw publishes it unchecked);
    the other lines are published. Exit 1 if a line was refused or not confirmed.
    Publishing a file twice is harmless: each run is closed out once.

    With --check, each line is accepted, accepted with these adjustments, or
    refused; no broker is needed. Exit 1 if a line is refused.

    Example: closeout publish runs.jsonl
    Example: closeout publish --check runs.jsonl
    """
    from consumer.commands.publish import check_file, publish_file

    if check:
        check_file(file, as_json=as_json)
        return
    publish_file(file, raw=raw, traceparent=traceparent, as_json=as_json)


def reconcile(
    *,
    repair: Annotated[bool, typer.Option("--repair", metavar="", help="Publish stale events; needs AMQP_URL.")] = False,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="Age of a stale event: 90s, 5m, 2h, 1d.")] = "5m",
    tenant: Tenant = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of runs listed per invariant.")] = 20,
    as_json: Json = False,
) -> None:
    """Check the invariants of every run and list the runs that violate one. Exit 1 if any does.

    Safe next to live workers. Changes nothing, except with --repair, which
    publishes stale events of all tenants, as a relay would, and checks again.
    With --since only those runs are read, and no-orphans is not checked: rows
    that belong to no run have no time of receipt.

    Example: closeout reconcile --tenant acme --older-than 10m
    """
    from consumer.commands.reconcile import run_reconcile

    run_reconcile(repair=repair, older_than=older_than, tenant=tenant, since=since, limit=limit, as_json=as_json)


def prune(
    *,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Runs received longer ago than this: 90d.")],
    tenant: Tenant = None,
    open_incidents: Annotated[
        bool, typer.Option("--open-incidents", metavar="", help="Also remove runs whose incident is OPEN.")
    ] = False,
    dry_run: DryRun = False,
    batch: Annotated[int, typer.Option(min=1, max=5_000, help="Maximum number of runs per transaction.")] = BATCH_RUNS,
    force: Annotated[
        bool,
        typer.Option(
            "--force", metavar="", help=f"Allow an age below {SAFE_AGE.days}d: a repeated message is then a new run."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove old runs with their incidents, prevention records, evaluations, traces and rollbacks.

    Safe next to live workers. A run is removed completely or kept. It is kept
    while it has unpublished events, while its legacy close-out is unfinished,
    and while its incident is OPEN (unless --open-incidents).

    A removed run is unknown: if its message arrives again, from the parked queue,
    a runner or a backup, it is closed out as a new run, with a new incident and
    new events. Choose an age above all of those.

    Example: closeout prune --older-than 90d --dry-run
    """
    from consumer.commands.prune import run_prune

    run_prune(
        older_than=older_than,
        tenant=tenant,
        open_incidents=open_incidents,
        dry_run=dry_run,
        batch=batch,
        force=force,
        as_json=as_json,
    )
