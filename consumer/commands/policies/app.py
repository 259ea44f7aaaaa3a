"""``closeout policies``: putting rules into force, and seeing which are."""

from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import out, print_json
from consumer.commands.policies.backtest import backtest_file
from consumer.commands.policies.backtest_view import owner
from consumer.commands.policies.dry_run import try_file
from consumer.commands.policies.files import PolicyFile, drafts_in
from consumer.commands.policies.shadow import shadow
from consumer.commands.session import with_database
from consumer.commands.typer_app import Application
from consumer.wording import counted
from domains.policies.apply import AppliedChange, apply_policies, list_policies

app = Application(help="Rules over completed runs, written in CEL.", no_args_is_help=True)
app.command("test")(try_file)
app.command("backtest")(backtest_file)
app.command("shadow")(shadow)
# Columns from which on a policy, with its condition, has room on one line; below it has two.
_WIDE = 130
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def apply(
    file: PolicyFile,
    *,
    as_json: _Json = False,
) -> None:
    """Put the policies of FILE into force; all of them, or none if one is faulty.

    A changed policy becomes a new version, the old one is kept. Workers take it
    up within five seconds.

    FILE is a list of {name, effect: flag | suppress_incident, severity,
    condition, tenant_id?, mode?, enabled?}. A condition is CEL over run, for
    example: run.status == "failed" && run.usage.cost_usd > 5.0

    With mode: shadow a policy is evaluated over every run and counted, and
    decides nothing; the version that is in force goes on deciding. closeout
    policies shadow says what it caught. Applied without mode: shadow, it decides.

    Example: closeout policies apply policies.yaml
    """
    drafts = drafts_in(file)

    async def work(engine: AsyncEngine) -> list[AppliedChange]:
        async with engine.begin() as conn:
            return await apply_policies(conn, drafts)

    changes = with_database(work)
    if as_json:
        print_json(changes)
        return
    for change in changes:
        owner = f" ({change.tenant_id})" if change.tenant_id else ""
        typer.echo(f"{change.name}{owner}: {change.change}, version {change.version}{_beside(change)}")
    if not changes:
        typer.echo("the file names no policy")


def _beside(change: AppliedChange) -> str:
    """Say of a version that does not decide that it does not, and of one in shadow what decides meanwhile."""
    if change.mode == "enforce":
        return "" if change.enabled else ", off"
    state = "in shadow" if change.enabled else "not in shadow"
    decides = "no version decides" if change.in_force is None else f"version {change.in_force} stays in force"
    return f", {state}; {decides}"


@app.command("list")
def list_(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only those that apply to this tenant.")] = None,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="Old versions too.")] = False,
    as_json: _Json = False,
) -> None:
    """List the policies, those for all tenants first, and whether each is in force, in shadow, or off.

    Example: closeout policies list --tenant acme --all-versions
    """

    async def work(engine: AsyncEngine) -> list[dict[str, Any]]:
        async with engine.connect() as conn:
            return await list_policies(conn, tenant_id=tenant, all_versions=all_versions)

    found = with_database(work)
    if as_json:
        print_json(found)
        return
    _print_list(found)
    out.print(counted(len(found), "policy", "policies"))


def _print_list(found: list[dict[str, Any]]) -> None:
    if out.width < _WIDE:
        for policy in found:
            about = f"{policy['name']}, version {policy['version']} ({policy['effect']} {policy['severity']}, "
            out.print(Text(f"{about}{owner(policy['tenant_id'])}): {_state_of(policy)}"), soft_wrap=True)
            out.print(Text(f"  {_condition_of(policy)}"), soft_wrap=True)
        return
    condition = Column("condition", overflow="fold")
    table = Table("tenant", "name", "version", "effect", "severity", "state", condition, box=None)
    for policy in found:
        table.add_row(
            Text(policy["tenant_id"] or "all"), Text(policy["name"]), str(policy["version"]), policy["effect"],
            policy["severity"], _state_of(policy), Text(_condition_of(policy)),
        )  # fmt: skip
    out.print(table)


def _condition_of(policy: dict[str, Any]) -> str:
    return " ".join(policy["condition"].split())


def _state_of(policy: dict[str, Any]) -> str:
    shadow = {None: "off", "running": "shadow", "ended": "shadow ended"}
    return "in force" if policy["enabled"] else shadow[policy["shadow"]]
