"""``closeout runs``."""

from typing import Annotated

import typer

from consumer.cli.options import ANY_ID, Json, Since, Tenant
from consumer.phases import TransactionPhase
from domains.incidents.rules import Severity
from domains.run import RunStatus

app = typer.Typer(help="List runs, and explain one.", no_args_is_help=True)

_PHASES = ", ".join(TransactionPhase)


@app.command("list")
def list_(
    *,
    tenant: Tenant = None,
    phase: Annotated[
        TransactionPhase | None, typer.Option(metavar="PHASE", help=f"Only runs in this phase: {_PHASES}.")
    ] = None,
    status: Annotated[
        RunStatus | None,
        typer.Option(metavar="STATUS", help="Only runs with this status: succeeded, failed, halted, aborted."),
    ] = None,
    session: Annotated[str | None, typer.Option(metavar="SESSION_ID", help="Only runs of this conversation.")] = None,
    agent: Annotated[str | None, typer.Option(metavar="AGENT_ID", help="Only runs of this agent.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only runs of this model.")] = None,
    error_code: Annotated[str | None, typer.Option(metavar="CODE", help="Only runs with this error code.")] = None,
    severity: Annotated[
        Severity | None,
        typer.Option(
            metavar="SEVERITY", help="Only runs whose incident has this severity: NONE, LOW, MEDIUM, HIGH, CRITICAL."
        ),
    ] = None,
    since: Since = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only runs received before 2h, 30d ago.")] = None,
    adjusted: Annotated[
        bool, typer.Option("--adjusted", metavar="", help="Only runs whose message had to be adjusted.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Runs to list, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List runs, newest first.

    Example: closeout runs list --tenant acme --status failed
    """
    from consumer.commands.runs import print_runs

    print_runs(
        tenant=tenant,
        phase=phase,
        status=status,
        session=session,
        agent=agent,
        model=model,
        error_code=error_code,
        severity=severity,
        since=since,
        until=until,
        is_adjusted=adjusted,
        limit=limit,
        as_json=as_json,
    )


@app.command(context_settings=ANY_ID)
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="RUN_ID, TENANT/RUN_ID, or TENANT followed by RUN_ID.")],
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="The run's id, if RUN is its tenant.")
    ] = None,
    *,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="The run's tenant; needed if several have a run with this id.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", metavar="", help="Print long texts completely.")] = False,
    as_json: Json = False,
) -> None:
    """Explain a run: its timeline, what each domain recorded and why, and which events are published.

    If the run is unknown and AMQP_URL is set, closeout.parked is searched for its
    message.

    Example: closeout runs show acme/0a0c9a3e-4a1f-5b0e-9a53-0f0f6c0a9a11
    """
    from consumer.commands.runs import show_run

    show_run(run if run_id is None else f"{run}/{run_id}", tenant=tenant, full=full, as_json=as_json)
