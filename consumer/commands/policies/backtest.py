"""Evaluates the policies of a file on stored runs."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consumer.commands.durations import parse_duration
from consumer.commands.output import print_json, progress_bar
from consumer.commands.policies.backtest_view import print_backtest
from consumer.commands.policies.files import drafts_in
from consumer.commands.session import run_to_end, settings_for
from consumer.policy_analysis.backtest import Backtest, backtest
from consumer.policy_analysis.processes import Processes
from consumer.policy_analysis.tally import Count, Tally, share_between
from consumer.postgres.engine import create_engine
from domains.policies.files import PolicyDraft


def backtest_file(
    file: Path, *, since: str, tenant: str | None, limit_examples: int, sample: int | None, as_json: bool
) -> None:
    """Evaluate the policies in *file* on stored runs, and print the results by tenant."""
    drafts = drafts_in(file)
    until = datetime.now(UTC)
    earliest = until - parse_duration("--since", since)

    url = settings_for(need_amqp=False).database_url.get_secret_value()

    async def work() -> Backtest:
        engine = create_engine(url, pool_size=1)
        try:
            with progress_bar("evaluating runs", estimate=True) as progress:
                return await backtest(
                    engine,
                    drafts,
                    since=earliest,
                    until=until,
                    tenant=tenant,
                    limit_examples=limit_examples,
                    progress=progress,
                    processes=Processes(url),
                    sample_size=sample,
                )
        finally:
            await engine.dispose()

    result = run_to_end(work())
    off = [draft for draft in drafts if not draft.enabled]
    if as_json:
        print_json(_as_json(result, off))
    else:
        print_backtest(result, off=[draft.name for draft in off], limit=limit_examples)


def _as_json(result: Backtest, off: list[PolicyDraft]) -> dict[str, Any]:
    return {
        "since": result.since,
        "until": result.until,
        "runs": result.runs,
        "sample_of": result.sample_of,
        "in_force": {name: getattr(result.in_force, name) for name in ("flagged", "suppressed", "errors")},
        "policies": [as_numbers(tally) | _interval(result, tally) for tally in result.tallies],
        "off": [{"name": draft.name, "tenant_id": draft.tenant_id} for draft in off],
    }


def _interval(result: Backtest, tally: Tally) -> dict[str, Any]:
    if result.sample_of is None:
        return {}
    low, high = share_between(tally.total.hits, tally.total.runs)
    return {"hits_share_95": [round(low, 6), round(high, 6)]}


def as_numbers(tally: Tally) -> dict[str, Any]:
    """Return the results of a policy as plain values for JSON."""
    draft = tally.draft
    return {
        "name": draft.name,
        "tenant_id": draft.tenant_id,
        "effect": draft.effect,
        "severity": draft.severity,
        "has_history": tally.has_history,
        "total": _numbers(tally.total),
        "tenants": [{"tenant_id": name, **_numbers(count)} for name, count in sorted(tally.tenants.items())],
        "examples": tally.examples,
    }


def _numbers(count: Count) -> dict[str, int]:
    return {name: getattr(count, name) for name in Count.__slots__}
