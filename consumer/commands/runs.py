"""Lists runs, and explains one."""

import asyncio
from datetime import UTC, datetime
from typing import Any, NoReturn

from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import examine_settings
from consumer.amqp.connection import BrokerConnection
from consumer.commands import parked_view as view
from consumer.commands.durations import parse_duration
from consumer.commands.output import EXIT_USAGE, fail, out, print_json, printable
from consumer.commands.run_view import format_time, print_report
from consumer.commands.session import with_database
from consumer.contract.refusals import EXPECTED
from consumer.contract.scalars import run_id_of, uuid_of
from consumer.errors import UnavailableError
from consumer.parked.operations import Filters, Report, find
from consumer.runs.lookup import RunFile, list_runs, owners, read_run
from consumer.wording import counted
from domains.run import RunKey

_LISTED = ("status", "error_code", "severity", "policy", "phase", "mode")
# Terminal columns from which a run fits on one line; below it takes two.
_WIDE = 130
# Parked messages of one run that are listed; a runner may have sent several.
_PARKED_SHOWN = 5
# Reasons for which the same message would be parked again after a replay.
_INVALID = {"invalid_json", "schema_violation", "unsupported_content_type", "conflicting_duplicate"}


def print_runs(
    *,
    limit: int,
    as_json: bool,
    since: str | None,
    until: str | None,
    **filters: Any,  # noqa: ANN401 - the other filters of list_runs
) -> None:
    """List the newest runs that match; *since* and *until* are durations before now."""
    now = datetime.now(UTC)
    for name, before in (("since", since), ("until", until)):
        if before is not None:
            filters[name] = now - parse_duration(f"--{name}", before)
    found = with_database(lambda engine: list_runs(engine, limit=limit, **filters))
    if as_json:
        print_json(found)
        return
    _print_list(found)
    more = " (the newest; --limit shows more)" if len(found) == limit else ""
    out.print(counted(len(found), "run") + more)


def show_run(name: str, *, tenant: str | None, full: bool, as_json: bool) -> None:
    """Print all that is stored of the run *name*, RUN_ID or TENANT/RUN_ID; end with status 1 if it is unknown."""
    owner, _, run_id = name.partition("/") if "/" in name else ("", "", name)
    if tenant and owner != tenant and uuid_of(run_id) is None:
        owner, run_id = "", name  # the id itself has a slash
    if owner and tenant and owner != tenant:
        fail(f"--tenant: found {tenant!r}, but RUN names tenant {owner!r}; expected the same", status=EXIT_USAGE)
    if run_id_of("", run_id) is None:
        fail(f"RUN: found {name!r}; expected {EXPECTED['run_id']}, or TENANT/RUN_ID", status=EXIT_USAGE)
    keys, found = with_database(lambda engine: _read(engine, run_id, owner or tenant))
    if found is None and owner and run_id_of("", name) is not None:
        # The slash may belong to the id.
        keys, found = with_database(lambda engine: _read(engine, name, tenant))
    if len(keys) > 1:
        names = ", ".join(key.tenant_id for key in keys)
        shared = keys[0].run_id if uuid_of(run_id) else name
        fail(f"several tenants have a run {shared}: {names}; select one with --tenant", status=EXIT_USAGE)
    if found is None:
        _unknown(run_id, owner or tenant, as_json=as_json)
    if as_json:
        print_json(found)
    else:
        print_report(found, full=full)


async def _read(engine: AsyncEngine, run_id: str, tenant: str | None) -> tuple[list[RunKey], RunFile | None]:
    """Return the keys of the runs called *run_id*, and the run if it is only one."""
    if tenant and (named := run_id_of(tenant, run_id)):
        keys = [RunKey(tenant, named[0])]
    else:
        async with engine.connect() as conn:
            keys = await owners(conn, run_id)
    return keys, await read_run(engine, keys[0].run_id, tenant=keys[0].tenant_id) if len(keys) == 1 else None


def _print_list(found: list[dict[str, Any]]) -> None:
    if out.width < _WIDE:
        for run in found:
            out.print(Text(f"{_received(run)}  {_name(run)}"), soft_wrap=True)
            out.print(Text("  " + "  ".join(str(run[name]) for name in _LISTED if run[name] is not None)))
        return
    table = Table("received (UTC)", Column("run", no_wrap=True), *_LISTED, box=None)
    for run in found:
        values = (Text("-" if run[name] is None else str(run[name])) for name in _LISTED)
        table.add_row(_received(run), Text(_name(run)), *values)
    out.print(table)


def _name(run: dict[str, Any]) -> str:
    return f"{run['tenant_id']}/{run['run_ref'] or run['run_id']}"


def _received(run: dict[str, Any]) -> str:
    return f"{run['received_at'].astimezone(UTC):%m-%d %H:%M:%S}"


def _unknown(run_id: str, owner: str | None, *, as_json: bool) -> NoReturn:
    """Report whether the message of an unknown run is parked, if AMQP_URL is set; end with status 1."""
    settings, faults = examine_settings()
    name = f"{owner}/{run_id}" if owner else run_id
    summary = f"run {name} is not stored"
    if "amqp_url" in faults:
        fail(f"{summary}; its message may be queued or parked: set AMQP_URL to search closeout.parked")

    async def search() -> Report:
        connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout runs show")
        try:
            return await find(connection, Filters(run=name), rows=_PARKED_SHOWN)
        finally:
            await connection.close()

    try:
        report = asyncio.run(search())
    except UnavailableError as error:
        fail(f"{summary}, and closeout.parked could not be searched: {error}")
    if as_json:
        view.print_json({"run": None, "parked": [view.as_plain(message) for message in report.rows]})
    if not report.count:
        fail(f"{summary}, and no parked message has it; its message may be queued")
    for message in report.rows if not as_json else ():
        at = format_time(message.parked_at)
        out.print(Text(printable(f"parked {at}, {message.reason or 'no reason'}: {message.error}")))
    remedy = f"after fixing the cause: closeout parked replay --run {name}"
    if {message.reason for message in report.rows} <= _INVALID:
        remedy = f"the runner must republish it with a valid body; then: closeout parked discard --run {name}"
    fail(f"{summary}: its message is parked\ndetails: closeout parked show {name}\n{remedy}")
