"""Checks the invariants of every run, and publishes stale events."""

from datetime import UTC, datetime
from typing import Any

import typer
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from consumer.commands.durations import parse_duration
from consumer.commands.outbox import drained_by
from consumer.commands.output import out, print_hanging, print_json, print_line
from consumer.commands.session import run_to_end, settings_for
from consumer.maintenance.reconcile import Finding, reconcile
from consumer.postgres.engine import create_engine
from consumer.wording import counted


def run_reconcile(
    *, repair: bool, older_than: str, tenant: str | None, since: str | None, limit: int, as_json: bool
) -> None:
    """Check the invariants, after publishing stale events with *repair*; end with status 1 if one is violated."""
    seconds = parse_duration("--older-than", older_than).total_seconds()
    earliest = datetime.now(UTC) - parse_duration("--since", since) if since is not None else None
    settings = settings_for(need_amqp=repair)

    async def work() -> tuple[list[Finding], dict[str, Any] | None]:
        engine = create_engine(settings.database_url.get_secret_value(), pool_size=1)
        try:
            repaired = await _repair(engine, settings, seconds) if repair else None
            findings = await reconcile(engine, older_than_seconds=seconds, tenant=tenant, since=earliest, limit=limit)
            return findings, repaired
        finally:
            await engine.dispose()

    findings, repaired = run_to_end(work())
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
            f"published stale events of {counted(repaired['runs'], 'run')}"
            if repaired["runs"] or why
            else "no stale events"
        )
        print_line(f"repair: {what}{why}")
    for finding in findings:
        rule = finding.invariant
        mark = (f"{finding.count:<7,}", "red") if finding.count else (f"{'ok':<7}", "green")
        print_hanging(Text.assemble(mark, f" {rule.name:<17} "), rule.rule)
        if not finding.count:
            continue
        for broken in finding.examples:
            # Not wrapped, so that a run's id can be copied.
            out.print(Text(f"          {broken.tenant_id}/{broken.run_id}  {broken.detail}"), soft_wrap=True)
        if finding.count > len(finding.examples):
            print_line(f"          and {finding.count - len(finding.examples):,} more (--limit)")
        print_hanging("        meaning: ", rule.meaning)
        print_hanging("        to do: ", rule.remedy)
