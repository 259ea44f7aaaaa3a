"""Evaluates policies of a file on stored runs, and compares the results with the enforced policies. Read-only.

A few hundred runs are in memory at a time: the number of runs costs time, not memory.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.policy_analysis.dry_run import policies_of
from consumer.runs.pages import estimate, pages
from consumer.runs.stored import StoredRun, read_runs, reading
from consumer.wording import Progress
from domains.policies.cel.conditions import Condition, ConditionError
from domains.policies.cel.visible import Visible
from domains.policies.explain import Answer, Value, ask, values_read
from domains.policies.files import PolicyDraft
from domains.policies.rules import acts_on
from domains.policies.tables import policies

# Runs per statement: 20 MB if each has 1,000 steps.
RUNS_A_STATEMENT = 200

EXAMPLES = ("newly", "again", "no_longer", "errors")

_Name = tuple[str | None, str]


class Example(Struct, frozen=True, kw_only=True):
    """A run, and the values that the condition read."""

    tenant_id: str
    run_id: UUID
    status: str
    error_code: str | None
    completed_at: datetime
    values: list[Value]
    error: str | None = None


@dataclass(slots=True)
class Count:
    """The results of one policy for one tenant.

    ``hits`` are runs that it would have flagged or suppressed; ``newly`` are those of them that no enforced policy of
    its name did. ``no_longer`` are runs that such a policy did and it would not. ``unknown`` depend on data
    that is not stored.
    """

    runs: int = 0
    hits: int = 0
    newly: int = 0
    no_longer: int = 0
    errors: int = 0
    unknown: int = 0

    def note(self, kind: str, *, did: bool) -> None:
        """Count a run; *did*: a policy of this name flagged or suppressed it."""
        self.runs += 1
        self.hits += kind in {"again", "newly"}
        self.newly += kind == "newly"
        # A failed condition does not flag either.
        self.no_longer += did and kind in {"no_longer", "errors"}
        self.errors += kind == "errors"
        self.unknown += kind == "unknown"

    def add(self, other: "Count") -> None:
        """Add *other* to this count."""
        for name in Count.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Tally:
    """The results of one policy. ``has_history``: one of its name and tenant is or was enforced."""

    draft: PolicyDraft
    condition: Condition | ConditionError
    has_history: bool
    tenants: dict[str, Count] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=lambda: {name: [] for name in EXAMPLES})

    @property
    def total(self) -> Count:
        """All tenants together."""
        total = Count()
        for count in self.tenants.values():
            total.add(count)
        return total


@dataclass(slots=True)
class InForce:
    """The results of the policies that were enforced when the runs were closed out."""

    flagged: int = 0
    suppressed: int = 0
    errors: int = 0


@dataclass(slots=True)
class Backtest:
    """The result of a backtest."""

    since: datetime
    until: datetime
    tallies: list[Tally]
    runs: int = 0
    in_force: InForce = field(default_factory=InForce)


async def backtest(
    engine: AsyncEngine,
    drafts: Sequence[PolicyDraft],
    *,
    since: datetime,
    until: datetime,
    tenant: str | None = None,
    limit_examples: int = 3,
    progress: Progress = lambda _done, _of: None,
) -> Backtest:
    """Evaluate *drafts* on the runs received from *since* to *until*; *progress* gets done and estimated total.

    Reads only, in short transactions; works with a role that has only SELECT, and on a standby.
    """
    async with reading(engine) as conn:
        names, known = await _stored_names(conn)
        result = Backtest(
            since,
            until,
            [
                Tally(draft, condition, (draft.tenant_id, draft.name) in known)
                for draft, _, condition in policies_of(drafts)
            ],
        )
        about = await estimate(conn, since=since, until=until, tenant=tenant)
        async for stored in runs_between(conn, since=since, until=until, tenant=tenant):
            for one in stored:
                _evaluate(one, result, names, limit_examples)
            result.runs += len(stored)
            progress(result.runs, max(about, result.runs))
    return result


async def runs_between(
    conn: AsyncConnection, *, since: datetime, until: datetime, tenant: str | None
) -> AsyncIterator[list[StoredRun]]:
    """Yield the stored runs of a time range, newest first, a few hundred at a time."""
    async for page in pages(conn, since=since, until=until, tenant=tenant):
        for start in range(0, len(page), RUNS_A_STATEMENT):
            keys = [received.key for received in page[start : start + RUNS_A_STATEMENT]]
            place = {key: position for position, key in enumerate(keys)}
            yield sorted(await read_runs(conn, keys), key=lambda stored: place[stored.run.key])


async def _stored_names(conn: AsyncConnection) -> tuple[dict[UUID, _Name], set[_Name]]:
    """Map policy version ids to (tenant, name); also return the names ever enforced."""
    row = policies.c
    rows = (await conn.execute(select(row.policy_id, row.tenant_id, row.name, row.shadow))).all()
    await conn.commit()
    names = {one.policy_id: (one.tenant_id, one.name) for one in rows}
    return names, {(one.tenant_id, one.name) for one in rows if one.shadow is None}


def _evaluate(stored: StoredRun, result: Backtest, names: dict[UUID, _Name], limit: int) -> None:
    run = stored.run
    result.in_force.flagged += bool(stored.violations)
    result.in_force.errors += stored.outcome == "evaluation_error"
    result.in_force.suppressed += stored.prevented_by is not None
    flagged = {names.get(policy_id) for policy_id in stored.violations}
    prevented = {names.get(stored.prevented_by)} if stored.prevented_by else set()
    visible = Visible(run, unknown=stored.unknown) if result.tallies else None
    for tally in result.tallies:
        draft = tally.draft
        if visible is None or draft.tenant_id not in {None, run.tenant_id}:
            continue
        answer, error = ask(tally.condition, visible)
        did = (draft.tenant_id, draft.name) in (flagged if draft.effect == "flag" else prevented)
        kind = _kind(answer, acts=acts_on(draft.effect, run), did=did)
        tally.tenants.setdefault(run.tenant_id, Count()).note(kind, did=did)
        if kind in tally.examples and len(tally.examples[kind]) < limit:
            tally.examples[kind].append(example_of(stored, tally.condition, visible, error))


def _kind(answer: Answer, *, acts: bool, did: bool) -> str:
    match answer:
        case "true" if acts:
            return "again" if did else "newly"
        case "error":
            return "errors"
        case "unknown":
            return "unknown"
        case _:
            return "no_longer" if did else "neither"


def example_of(
    stored: StoredRun, condition: Condition | ConditionError, visible: Visible, error: str | None
) -> Example:
    """Return *stored* with the values that *condition* read, and the reason if it has no result."""
    run = stored.run
    return Example(
        tenant_id=run.tenant_id,
        run_id=run.run_id,
        status=run.status,
        error_code=run.error_code,
        completed_at=run.completed_at,
        values=values_read(condition, visible) if isinstance(condition, Condition) else [],
        error=error,
    )
