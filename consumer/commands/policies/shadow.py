"""``closeout policies shadow``: what the policies in shadow have caught since they were applied."""

from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.commands.output import print_json
from consumer.commands.policies.backtest import Examples, as_numbers, looking_at_runs
from consumer.commands.policies.backtest_view import line, moment, policy
from consumer.commands.session import with_database
from consumer.policy_analysis.shadow_results import Caught, caught_in_shadow
from consumer.wording import counted


def shadow(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's runs.")] = None,
    limit_examples: Examples = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what each policy in shadow has caught since it was applied, by tenant, with examples.

    Beside it stands what the version in force did to the same runs. To put a
    policy into force, apply it without mode: shadow; to end the trial, apply it
    with enabled: false. Reads only.

    Example: closeout policies shadow --tenant acme
    """

    async def work(engine: AsyncEngine) -> list[Caught]:
        with looking_at_runs() as progress:
            return await caught_in_shadow(engine, tenant=tenant, limit_examples=limit_examples, progress=progress)

    found = with_database(work)
    if as_json:
        print_json([_as_json(caught) for caught in found])
        return
    for caught in found:
        beside = "no version decides" if caught.in_force is None else f"version {caught.in_force} decides"
        line(f"Version {caught.version}, in shadow since {moment(caught.since)}; {beside}")
        policy(caught.tally, limit_examples)
        line("")
    line(f"{counted(len(found), 'policy', 'policies')} in shadow")


def _as_json(caught: Caught) -> dict[str, Any]:
    return {
        "policy_id": caught.policy_id,
        "version": caught.version,
        "since": caught.since,
        "in_force": caught.in_force,
        **as_numbers(caught.tally),
    }
