"""Counts on how many of the latest runs the condition of each policy failed, or would have failed."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.runs.pages import pages
from consumer.runs.stored import StoredRun, read_runs, reading
from domains.policies.cel.conditions import Condition
from domains.policies.cel.visible import Visible
from domains.policies.explain import ask
from domains.policies.files import PolicyDraft

# Runs that are searched: the newest of the last day.
_RUNS_AT_MOST = 100_000

# Stored runs on which a new condition is tried.
_TRIED = 500

# By complete keys: the inbox has an index by time, the evaluations have none.
_LATEST = text(
    """
    WITH latest AS MATERIALIZED (
        SELECT tenant_id, run_id FROM governance.run_completions
         WHERE received_at > now() - interval '1 day' AND committed_at IS NOT NULL
         LIMIT :most
    ), failed AS (
        SELECT evaluation.errors FROM latest JOIN governance.policy_evaluations evaluation USING (tenant_id, run_id)
         WHERE evaluation.outcome = 'evaluation_error'
    )
    SELECT (SELECT count(*) FROM latest) AS runs, fault ->> 'policy_id' AS policy_id, count(*) AS failures
      FROM failed, jsonb_array_elements(failed.errors) AS fault
     GROUP BY 2
    """
)


class Failures(NamedTuple):
    """The number of runs that were searched, and of those on which each policy failed."""

    runs: int
    by_policy: dict[UUID, int]


async def failures_of_the_last_day(conn: AsyncConnection) -> Failures:
    """Count the evaluation errors of up to 100,000 runs of the last 24 hours, by the version of the policy."""
    rows = (await conn.execute(_LATEST, {"most": _RUNS_AT_MOST})).all()
    return Failures(rows[0].runs if rows else 0, {UUID(row.policy_id): row.failures for row in rows})


class WouldFail(NamedTuple):
    """A policy in a file whose condition fails on stored runs: on how many of how many, and the first error."""

    name: str
    failures: int
    runs: int
    error: str


async def would_fail(engine: AsyncEngine, drafts: Sequence[PolicyDraft]) -> list[WouldFail]:
    """Evaluate the enabled *drafts* on the newest runs of the last day, at most 500 per tenant; return what fails."""
    found: list[WouldFail] = []
    async with reading(engine) as conn:
        for tenant in sorted({draft.tenant_id for draft in drafts}, key=str):
            now = datetime.now(UTC)
            newest = pages(conn, since=now - timedelta(days=1), until=now, tenant=tenant, size=_TRIED)
            keys = [received.key for received in await anext(newest, [])]
            runs = await read_runs(conn, keys) if keys else []
            found += _failing([draft for draft in drafts if draft.enabled and draft.tenant_id == tenant], runs)
    return found


def _failing(drafts: Sequence[PolicyDraft], runs: Sequence[StoredRun]) -> Iterator[WouldFail]:
    for draft in drafts:
        condition = Condition(draft.condition)
        answers = [ask(condition, Visible(stored.run, unknown=stored.unknown)) for stored in runs]
        errors = [answer.error or "" for answer in answers if answer.answer == "error"]
        if errors:
            yield WouldFail(draft.name, len(errors), len(runs), errors[0])
