"""``closeout runs``: what became of runs, for a person and for a machine."""

import asyncio
from datetime import UTC
from typing import Annotated, Any, NoReturn
from uuid import UUID

import typer
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import examine_settings
from consumer.amqp.connection import BrokerConnection
from consumer.commands import parked_view as screen
from consumer.commands.output import EXIT_USAGE, fail, out, print_json
from consumer.commands.run_view import moment, print_story
from consumer.commands.session import with_database
from consumer.commands.typer_app import Application
from consumer.errors import UnavailableError
from consumer.parked.operations import Filters, Report, look
from consumer.phases import TransactionPhase
from consumer.runs.lookup import RunFile, list_runs, owners, read_run
from consumer.wording import counted
from domains.run import RunStatus

app = Application(help="Look at runs: which there are, and all that is known of one.", no_args_is_help=True)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_LISTED = ("status", "error_code", "severity", "policy", "phase", "mode")
# Columns from which on a run, with its status, has room on one line; below it has two.
_WIDE = 130
# Messages of one run that are named; more than one only if its runner sent several.
_PARKED_SHOWN = 5
# Reasons for which the same message would be parked again, whatever is mended here.
_RUNNERS_FAULT = {"invalid_json", "schema_violation", "unsupported_content_type", "conflicting_duplicate"}


@app.command("list")
def list_(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    phase: Annotated[TransactionPhase | None, typer.Option(help="Only runs in this phase.")] = None,
    status: Annotated[RunStatus | None, typer.Option(help="Only runs that ended so.")] = None,
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
    _print_list(found)
    more = " (the newest; --limit shows more)" if len(found) == limit else ""
    out.print(counted(len(found), "run") + more)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(help="The run's UUID, or <tenant_id>/<run_id>.")],
    *,
    tenant: Annotated[str | None, typer.Option(help="Whose run; needed if two tenants have one of this id.")] = None,
    as_json: _Json = False,
) -> None:
    """Explain a run: what happened and when, what each domain recorded and why, which events went out or wait.

    If the run is unknown and AMQP_URL is set, its message is looked for in
    closeout.parked.

    Example: closeout runs show acme/0a0c9a3e-4a1f-5b0e-9a53-0f0f6c0a9a11
    """
    owner, _, bare = run_id.rpartition("/")
    try:
        identity = UUID(bare)
    except ValueError:
        fail(f"RUN_ID: found {run_id!r}; expected a UUID or <tenant_id>/<run_id>", status=EXIT_USAGE)

    if owner and tenant and owner != tenant:
        words = f"--tenant: found {tenant!r}, and RUN_ID names {owner!r}; expected one of them, or both the same"
        fail(words, status=EXIT_USAGE)
    tenants, found = with_database(lambda engine: _read(engine, identity, owner or tenant))
    if len(tenants) > 1:
        names = ", ".join(tenants)
        fail(f"several tenants have a run {identity}: {names}; name one with --tenant", status=EXIT_USAGE)
    if found is None:
        _unknown(identity, owner or tenant, as_json=as_json)
    if as_json:
        print_json(found)
    else:
        print_story(found)


async def _read(engine: AsyncEngine, run_id: UUID, tenant: str | None) -> tuple[list[str], RunFile | None]:
    """Return the tenants that are meant, and the run if it is one's alone."""
    tenants = [tenant] if tenant else []
    if not tenant:
        async with engine.connect() as conn:
            tenants = await owners(conn, run_id)
    return tenants, await read_run(engine, run_id, tenant=tenants[0]) if len(tenants) == 1 else None


def _print_list(found: list[dict[str, Any]]) -> None:
    if out.width < _WIDE:
        for run in found:
            out.print(Text(f"{_received(run)}  {run['tenant_id']}/{run['run_id']}"), soft_wrap=True)
            out.print(Text("  " + "  ".join(str(run[name]) for name in _LISTED if run[name] is not None)))
        return
    table = Table("received (UTC)", Column("run", no_wrap=True), *_LISTED, box=None)
    for run in found:
        values = (Text("-" if run[name] is None else str(run[name])) for name in _LISTED)
        table.add_row(_received(run), Text(f"{run['tenant_id']}/{run['run_id']}"), *values)
    out.print(table)


def _received(run: dict[str, Any]) -> str:
    return f"{run['received_at'].astimezone(UTC):%m-%d %H:%M:%S}"


def _unknown(identity: UUID, owner: str | None, *, as_json: bool) -> NoReturn:
    """Say what is known of a run that was not closed out: whether its message is parked, if a broker was named."""
    settings, faults = examine_settings()
    name = f"{owner}/{identity}" if owner else str(identity)
    told = f"no run {name} is known here"
    if "amqp_url" in faults:
        fail(f"{told}; it may still be queued, or parked: with AMQP_URL set, closeout.parked is looked through too")

    async def search() -> Report:
        connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout runs show")
        try:
            return await look(connection, Filters(run=name), rows=_PARKED_SHOWN)
        finally:
            await connection.close()

    try:
        report = asyncio.run(search())
    except UnavailableError as error:
        fail(f"{told}, and closeout.parked could not be looked through: {error}")
    if as_json:
        screen.print_json({"run": None, "parked": [screen.as_plain(message) for message in report.rows]})
    if not report.count:
        fail(f"{told}, and no parked message names it; it may still be queued")
    for message in report.rows if not as_json else ():
        at = moment(message.parked_at)
        out.print(Text(screen.printable(f"parked {at}, {message.reason or 'without a reason'}: {message.error}")))
    remedy = f"once the cause is mended: closeout parked replay --run {name}"
    if {message.reason for message in report.rows} <= _RUNNERS_FAULT:
        remedy = f"its runner must publish it again, rightly; then: closeout parked discard --run {name}"
    fail(f"{told}: its message is parked\nall of it: closeout parked show {name}\n{remedy}")
