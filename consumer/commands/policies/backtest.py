"""``closeout policies backtest``: what policies of a file would have done to stored runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.durations import age
from consumer.commands.output import err, print_json
from consumer.commands.policies.backtest_view import show
from consumer.commands.policies.files import PolicyFile, drafts_in
from consumer.commands.session import with_database
from consumer.policy_analysis.backtest import Backtest, Count, Tally, backtest
from domains.policies.files import PolicyDraft

Since = Annotated[str, typer.Option(metavar="TIME", help="How far back, by when runs were received: 2h, 30d.")]
Examples = Annotated[int, typer.Option(min=0, max=1_000, help="Runs to show of each policy and kind, at most.")]


def backtest_file(
    file: PolicyFile,
    *,
    since: Since = "30d",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's runs.")] = None,
    limit_examples: Examples = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold the policies of FILE against stored runs: what each would have flagged or suppressed, by tenant.

    Beside it stands what the policies did that were in force: newly are runs that
    no policy of this name flagged or suppressed, no longer those that one did.
    Reads only, in short transactions beside live workers; a role that may SELECT
    is enough. Some fields are not stored: the error message where the incident
    was suppressed, steps and trace id of a run that was not traced. A run whose
    answer depends on one of them counts as unknown.

    Example: closeout policies backtest policies.yaml --since 30d --tenant acme
    """
    drafts = drafts_in(file)
    until = datetime.now(UTC)
    earliest = until - age("--since", since)

    async def work(engine: AsyncEngine) -> Backtest:
        with looking_at_runs() as progress:
            return await backtest(
                engine,
                drafts,
                since=earliest,
                until=until,
                tenant=tenant,
                limit_examples=limit_examples,
                progress=progress,
            )

    result = with_database(work)
    off = [draft for draft in drafts if not draft.enabled]
    if as_json:
        print_json(_as_json(result, off))
    else:
        show(result, off=[draft.name for draft in off], limit=limit_examples)


@contextmanager
def looking_at_runs() -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal how many runs were looked at, of about how many; give what is told so."""
    bar = Progress(
        TextColumn("looking at runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    with bar if err.is_terminal else nullcontext():
        shown = bar.add_task("looking at runs", total=None)
        yield lambda done, of: bar.update(shown, completed=done, total=of)


def _as_json(result: Backtest, off: list[PolicyDraft]) -> dict[str, Any]:
    return {
        "since": result.since,
        "until": result.until,
        "runs": result.runs,
        "in_force": {name: getattr(result.in_force, name) for name in ("flagged", "suppressed", "errors")},
        "policies": [as_numbers(tally) for tally in result.tallies],
        "off": [{"name": draft.name, "tenant_id": draft.tenant_id} for draft in off],
    }


def as_numbers(tally: Tally) -> dict[str, Any]:
    """Return what a policy would have done as JSON has it."""
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
