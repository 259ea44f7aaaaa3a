"""Prints the results of shadow policies since they were applied."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import format_time, print_json, progress_bar
from consumer.commands.policies.backtest import as_numbers
from consumer.commands.policies.backtest_view import print_one, print_policy
from consumer.commands.session import with_database
from consumer.policy_analysis.shadow_results import Caught, caught_in_shadow
from consumer.wording import counted


def print_shadow(*, tenant: str | None, limit_examples: int, as_json: bool) -> None:
    """Print the results of each shadow policy, by tenant, with examples."""

    async def work(engine: AsyncEngine) -> list[Caught]:
        with progress_bar("evaluating runs", estimate=True) as progress:
            return await caught_in_shadow(engine, tenant=tenant, limit_examples=limit_examples, progress=progress)

    found = with_database(work)
    if as_json:
        print_json([_as_json(caught) for caught in found])
        return
    for caught in found:
        enforced = "no version is enforced" if caught.in_force is None else f"version {caught.in_force} is enforced"
        print_one(f"Version {caught.version}, in shadow since {format_time(caught.since)}; {enforced}")
        print_policy(caught.tally, limit_examples)
        print_one("")
    print_one(f"{counted(len(found), 'policy', 'policies')} in shadow")


def _as_json(caught: Caught) -> dict[str, Any]:
    return {
        "policy_id": caught.policy_id,
        "version": caught.version,
        "since": caught.since,
        "in_force": caught.in_force,
        **as_numbers(caught.tally),
    }
