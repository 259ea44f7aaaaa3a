"""Applies policies from a file, and lists the stored ones."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import out, print_json, printable
from consumer.commands.policies.backtest_view import owner
from consumer.commands.policies.files import drafts_in
from consumer.commands.session import with_database
from consumer.errors import one_line
from consumer.policy_analysis.failures import failures_of_the_last_day, would_fail
from consumer.postgres.engine import DATABASE_ERRORS
from consumer.runs.lookup import has_runs
from consumer.wording import counted
from domains.policies.apply import AppliedChange, apply_policies, list_policies
from domains.policies.files import PolicyDraft

# Terminal columns from which a policy fits on one line; below it takes two.
_WIDE = 130


def apply_file(file: Path, *, as_json: bool) -> None:
    """Apply the policies in *file*, all or none, and print what changed."""
    drafts = drafts_in(file)

    async def work(engine: AsyncEngine) -> tuple[list[AppliedChange], list[str]]:
        async with engine.begin() as conn:
            changes = await apply_policies(conn, drafts)
        try:
            return changes, [warning async for warning in _warnings(engine, drafts)]
        except DATABASE_ERRORS as error:  # the policies are applied
            return changes, [f"stored runs could not be read: {one_line(error)}"]

    changes, warnings = with_database(work)
    for warning in warnings:
        typer.echo(printable(f"warning: {warning}"), err=True)
    if as_json:
        print_json(changes)
        return
    for change in changes:
        owner = f" ({change.tenant_id})" if change.tenant_id else ""
        typer.echo(f"{change.name}{owner}: {change.change}, version {change.version}{_mode_of(change)}")
    if not changes:
        typer.echo("the file contains no policy")


async def _warnings(engine: AsyncEngine, drafts: Sequence[PolicyDraft]) -> AsyncIterator[str]:
    async with engine.connect() as conn:
        for tenant_id in sorted({draft.tenant_id for draft in drafts if draft.tenant_id}):
            if not await has_runs(conn, tenant_id):
                yield f"tenant {tenant_id} has no runs; if it is not new, check its spelling"
    for one in await would_fail(engine, drafts):
        share = f"{one.failures:,} of the last {counted(one.runs, 'run')}"
        yield f"the condition of {one.name} fails on {share}: {one.error}"


def _mode_of(change: AppliedChange) -> str:
    """Describe the version's mode and which version is enforced."""
    if change.mode == "enforce":
        return "" if change.enabled else ", off"
    state = "in shadow" if change.enabled else "not in shadow"
    enforced = "no version is enforced" if change.in_force is None else f"version {change.in_force} stays enforced"
    return f", {state}; {enforced}"


def print_policies(*, tenant: str | None, all_versions: bool, as_json: bool) -> None:
    """List the stored policies, those for all tenants first."""

    async def work(engine: AsyncEngine) -> list[dict[str, Any]]:
        async with engine.connect() as conn:
            found = await list_policies(conn, tenant_id=tenant, all_versions=all_versions)
            failures = await failures_of_the_last_day(conn)
        for policy in found:
            policy["failed_runs"] = failures.by_policy.get(policy["policy_id"], 0)
            policy["searched_runs"] = failures.runs
        return found

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
    state = "enforced" if policy["enabled"] else shadow[policy["shadow"]]
    if not policy["failed_runs"]:
        return state
    return f"{state}, FAILED on {policy['failed_runs']:,} of {counted(policy['searched_runs'], 'run')} of the last day"
