"""``closeout reconcile``: whether all that must hold of every run does, and the stale events published."""

from typing import Annotated, Any

import typer
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from consumer.commands.durations import age
from consumer.commands.outbox import drained_by
from consumer.commands.output import hanging, out, print_json, say
from consumer.commands.session import in_words, settings_for
from consumer.maintenance.reconcile import Finding
from consumer.maintenance.reconcile import reconcile as check
from consumer.postgres.engine import create_engine
from consumer.wording import counted


def reconcile(
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Publish the events that are stale; needs AMQP_URL.")
    ] = False,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="What is stale: 90s, 5m, 2h, 1d.")] = "5m",
    tenant: Annotated[str | None, typer.Option(help="Check this tenant's runs only.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Runs to name for each rule, at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what must hold of every run, beside live workers; name the runs that break it. Exit 1 if any does.

    Nothing is changed without --repair, which publishes stale events, of all
    tenants, as a worker's relay would, and checks again.

    Example: closeout reconcile --tenant acme --older-than 10m
    """
    seconds = age("--older-than", older_than).total_seconds()
    settings = settings_for(need_amqp=repair)

    async def work() -> tuple[list[Finding], dict[str, Any] | None]:
        engine = create_engine(settings.database_url.get_secret_value(), pool_size=1)
        try:
            repaired = await _repair(engine, settings, seconds) if repair else None
            return await check(engine, older_than_seconds=seconds, tenant=tenant, limit=limit), repaired
        finally:
            await engine.dispose()

    findings, repaired = in_words(work())
    if as_json:
        print_json({"repaired": repaired, "invariants": [_as_json(finding) for finding in findings]})
    else:
        _print(findings, repaired)
    if any(finding.count for finding in findings) or (repaired and repaired["failure"]):
        raise typer.Exit(1)


async def _repair(engine: AsyncEngine, settings: Settings, seconds: float) -> dict[str, Any]:
    drained = await drained_by(engine, settings, name="closeout reconcile", older_than_seconds=seconds)
    return {"runs": drained.runs, "failure": drained.failure}


def _as_json(finding: Finding) -> dict[str, Any]:
    rule = finding.invariant
    return {
        "name": rule.name,
        "rule": rule.rule,
        "broken": finding.count,
        "runs": [broken._asdict() for broken in finding.examples],
        **({"meaning": rule.meaning, "remedy": rule.remedy} if finding.count else {}),
    }


def _print(findings: list[Finding], repaired: dict[str, Any] | None) -> None:
    if repaired is not None:
        why = f"; then: {repaired['failure']}" if repaired["failure"] else ""
        what = (
            f"stale events of {counted(repaired['runs'], 'run')}"
            if repaired["runs"] or why
            else "nothing was stale, nothing"
        )
        say(f"repair: {what} published{why}")
    for finding in findings:
        rule = finding.invariant
        mark = (f"{finding.count:<7,}", "red") if finding.count else (f"{'ok':<7}", "green")
        hanging(Text.assemble(mark, f" {rule.name:<17} "), rule.rule)
        if not finding.count:
            continue
        for broken in finding.examples:
            # Never wrapped: a run's name is there to be copied.
            out.print(Text(f"          {broken.tenant_id}/{broken.run_id}  {broken.detail}"), soft_wrap=True)
        if finding.count > len(finding.examples):
            say(f"          and {finding.count - len(finding.examples):,} more (--limit)")
        hanging("        it means: ", rule.meaning)
        hanging("        to do: ", rule.remedy)
