"""``closeout runs``: what became of runs, for a person and for a machine."""

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import EXIT_USAGE, fail, out, print_json
from consumer.commands.session import with_database
from consumer.inspection import RunFile, list_runs, read_run
from consumer.phases import TransactionPhase

app = typer.Typer(help="Look at runs: which there are, and all that is known of one.", no_args_is_help=True)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


_LISTED = ("status", "error_code", "severity", "policy", "phase", "mode")


@app.command("list")
def list_(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    phase: Annotated[TransactionPhase | None, typer.Option(help="Only runs in this phase.")] = None,
    status: Annotated[str | None, typer.Option(help="succeeded, failed, halted or aborted.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, newest first.")] = 20,
    as_json: _Json = False,
) -> None:
    """List runs, newest first.

    Example: closeout runs list --tenant acme --status failed
    """
    found = with_database(lambda engine: list_runs(engine, tenant=tenant, phase=phase, status=status, limit=limit))
    if as_json:
        print_json(found)
        return
    table = Table("received (UTC)", Column("run", no_wrap=True), *_LISTED, box=None)
    for run in found:
        values = (Text(_plain(run[name])) for name in _LISTED)
        run_name = Text(f"{run['tenant_id']}/{run['run_id']}")
        table.add_row(f"{run['received_at'].astimezone(UTC):%m-%d %H:%M:%S}", run_name, *values)
    out.print(table)
    out.print(f"{len(found)} runs" + (f" (the newest {limit}; --limit shows more)" if len(found) == limit else ""))


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(help="The run's UUID, or <tenant_id>/<run_id>.")],
    *,
    tenant: Annotated[str | None, typer.Option(help="Whose run; needed if two tenants have one of this id.")] = None,
    as_json: _Json = False,
) -> None:
    """Show a run's phases, rows and events on one screen.

    Example: closeout runs show acme/0a0c9a3e-4a1f-5b0e-9a53-0f0f6c0a9a11
    """
    owner, _, bare = run_id.rpartition("/")
    try:
        identity = UUID(bare)
    except ValueError:
        fail(f"RUN_ID: found {run_id!r}; expected a UUID or <tenant_id>/<run_id>", status=EXIT_USAGE)

    async def read(engine: AsyncEngine) -> list[RunFile]:
        return await read_run(engine, identity, tenant=owner or tenant)

    found = with_database(read)
    if not found:
        fail(f"no run {identity} is known here; it may still be queued, or parked")
    if len(found) > 1:
        owners = ", ".join(str(run.completion["tenant_id"]) for run in found)
        fail(f"several tenants have a run {identity}: {owners}; name one with --tenant", status=EXIT_USAGE)
    if as_json:
        print_json(found[0])
    else:
        _print(found[0])


def _print(run: RunFile) -> None:
    done = run.completion
    out.print(Text(f"Run {done['tenant_id']}/{done['run_id']}", style="bold"))
    out.print(Text(_sentence(run)))
    out.print()
    _section("phases", [(name, at or "passed in the same transaction") for name, at in run.phases()])
    _section("run", [(name, done[name]) for name in _RUN_FIELDS])
    for title, row in (
        ("incident", run.incident),
        ("prevention record", run.prevention_record),
        ("policy evaluation", run.policy_evaluation),
        ("trace", run.trace),
    ):
        if row is not None:
            _section(title, [(n, v) for n, v in row.items() if n not in {"tenant_id", "run_id", "steps"}])
    if run.trace is not None and run.trace["steps"]:
        table = Table("step", "skill", "status", "ms", "cost", "error", box=None, padding=(0, 2, 0, 2))
        for step in run.trace["steps"]:
            values = (step.get(name) for name in ("index", "skill", "status", "duration_ms", "cost_usd", "error_code"))
            table.add_row(*(Text("-" if value is None else str(value)) for value in values))
        out.print(table)
        out.print()
    _section("events", _events(run))
    _section("rollbacks", [(_moment(r["occurred_at"]), f"attempt {r['attempt']} at {r['phase_reached']}: {r['error']}")
                           for r in run.rollbacks])  # fmt: skip


_RUN_FIELDS = (
    "status", "error_code", "agent_id", "model", "cost_usd", "input_tokens", "output_tokens", "started_at",
    "completed_at", "mode", "message_id", "is_synthetic", "metadata",
)  # fmt: skip


def _events(run: RunFile) -> list[tuple[str, str]]:
    waiting = {event["type"]: f"waits since {_moment(event['created_at'])}" for event in run.outbox}
    finding = "incident.suppressed" if run.prevention_record else "incident.created"
    published = run.completion["events_published_at"]
    out_by = f"confirmed by {_moment(published)}" if published else "confirmed"
    if run.completion["committed_at"] is None:
        return [("none yet", "events go out after the last write")]
    return [(kind, waiting.get(kind, out_by)) for kind in (finding, "policy.evaluated", "run.finalized")]


def _section(title: str, rows: list[tuple[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title, "", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.columns[0].min_width = 22
    for name, value in rows:
        table.add_row("  " + name, Text(_plain(value)))
    out.print(table)
    out.print()


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return _moment(value)
    return "-" if value is None else str(value)


def _moment(at: datetime | None) -> str:
    return "-" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + "Z"


def _sentence(run: RunFile) -> str:
    done = run.completion
    seconds = (done["completed_at"] - done["started_at"]).total_seconds()
    told = f"It {done['status']} after {seconds:g} s"
    if done["error_code"]:
        told += f" with {done['error_code']}"
    if run.incident is not None:
        told += f"; a {run.incident['severity']} incident ({run.incident['category']}) is {run.incident['status']}"
    elif run.prevention_record is not None:
        told += "; a policy kept an incident from being raised"
    if run.policy_evaluation is not None:
        told += f"; policies: {run.policy_evaluation['outcome']}"
    return told + f". It is at {done['phase']}."
