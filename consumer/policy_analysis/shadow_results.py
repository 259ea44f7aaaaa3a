"""Reads the recorded results of shadow policies since they were applied; read-only, in short transactions.

They are compared with the results of the enforced version on the same runs.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.policy_analysis.tally import Count, Tally, example_of
from consumer.runs.pages import estimate, pages
from consumer.runs.stored import StoredRun, read_runs, reading
from consumer.wording import Progress
from domains.database.statements import columns_of, unnest
from domains.policies.book import compiled
from domains.policies.cel.visible import Visible
from domains.policies.files import PolicyDraft
from domains.run import RunKey
from domains.tables import policies, policy_evaluations, prevention_records

# A run is received before it is evaluated: minutes earlier if the database was unavailable.
_RECEIVED_EARLIER = timedelta(hours=1)
_KEYS = ("tenant_id", "run_id")


@dataclass(slots=True)
class Caught:
    """A shadow version, the enforced version, and the shadow's results."""

    policy_id: UUID
    version: int
    since: datetime
    in_force: int | None
    tally: Tally
    kept: dict[str, list[tuple[RunKey, str | None]]] = field(default_factory=dict)


class _Evaluated(NamedTuple):
    key: RunKey
    at: datetime
    shadow: dict[str, dict[str, Any]]
    did: frozenset[tuple[str, str]]


async def caught_in_shadow(
    engine: AsyncEngine,
    *,
    tenant: str | None = None,
    limit_examples: int = 3,
    progress: Progress = lambda _done, _of: None,
) -> list[Caught]:
    """Return the results of each current shadow policy, for all tenants or one."""
    async with reading(engine) as conn:
        names, found = await _in_shadow(conn)
        if not found:
            return []
        span = {"since": min(one.since for one in found) - _RECEIVED_EARLIER, "until": datetime.now(UTC)}
        done, about = 0, await estimate(conn, **span, tenant=tenant)
        async for evaluated in _evaluations(conn, names, **span, tenant=tenant):
            for one in evaluated:
                for caught in found:
                    _count(one, caught, limit_examples)
            done += len(evaluated)
            progress(done, max(about, done))
        await _put_examples(conn, found)
    return found


async def _in_shadow(conn: AsyncConnection) -> tuple[dict[UUID, str], list[Caught]]:
    """Return the name of each stored version, and the versions in shadow."""
    row = policies.c
    rows = (await conn.execute(select(policies).order_by(row.tenant_id.nulls_first(), row.name))).mappings().all()
    await conn.commit()
    deciding = {(one["tenant_id"], one["name"]): one["version"] for one in rows if one["enabled"]}
    found = []
    for one in rows:
        if one["shadow"] != "running":
            continue
        in_force = deciding.get((one["tenant_id"], one["name"]))
        fields = {name: one[name] for name in ("name", "tenant_id", "effect", "severity", "condition")}
        tally = Tally(PolicyDraft(**fields, mode="shadow"), compiled(one["condition"]), in_force is not None)
        found.append(Caught(one["policy_id"], one["version"], one["created_at"], in_force, tally))
    return {one["policy_id"]: _name(one["tenant_id"], one["name"]) for one in rows}, found


def _name(tenant_id: str | None, name: str) -> str:
    return f"{tenant_id or ''}/{name}"


def _statement() -> Select[Any]:
    given = unnest(policy_evaluations, _KEYS)
    one, other = policy_evaluations.c, prevention_records.c
    return (
        select(one.tenant_id, one.run_id, one.evaluated_at, one.shadow, one.violations, other.policy_id)
        .select_from(policy_evaluations)
        .join(given, (one.tenant_id == given.c.tenant_id) & (one.run_id == given.c.run_id))
        # Citus joins distributed tables with each other, not with the keys.
        .outerjoin(prevention_records, (other.tenant_id == one.tenant_id) & (other.run_id == one.run_id))
    )


_EVALUATED = _statement()


async def _evaluations(
    conn: AsyncConnection, names: dict[UUID, str], *, since: datetime, until: datetime, tenant: str | None
) -> AsyncIterator[list[_Evaluated]]:
    async for page in pages(conn, since=since, until=until, tenant=tenant):
        rows = (await conn.execute(_EVALUATED, columns_of(_KEYS, [received.key for received in page]))).all()
        await conn.commit()
        found = {RunKey(row.tenant_id, row.run_id): row for row in rows}
        yield [_evaluated(received.key, found[received.key], names) for received in page if received.key in found]


def _evaluated(key: RunKey, row: Any, names: dict[UUID, str]) -> _Evaluated:  # noqa: ANN401 - a row of six columns
    did = {("flag", names.get(UUID(found["policy_id"]), "")) for found in row.violations}
    if row.policy_id is not None:
        did.add(("suppress_incident", names.get(row.policy_id, "")))
    return _Evaluated(key, row.evaluated_at, {one["policy_id"]: one for one in row.shadow or ()}, frozenset(did))


def _count(evaluated: _Evaluated, caught: Caught, limit: int) -> None:
    draft = caught.tally.draft
    if evaluated.at < caught.since or draft.tenant_id not in {None, evaluated.key.tenant_id}:
        return
    hit = evaluated.shadow.get(str(caught.policy_id))
    did = (draft.effect, _name(draft.tenant_id, draft.name)) in evaluated.did
    if hit is None:
        kind = "no_longer" if did else "neither"
    else:
        kind = "errors" if hit["result"] == "error" else "again" if did else "newly"
    caught.tally.tenants.setdefault(evaluated.key.tenant_id, Count()).note(kind, did=did)
    kept = caught.kept.setdefault(kind, [])
    if kind in caught.tally.examples and len(kept) < limit:
        kept.append((evaluated.key, hit.get("error") if hit else None))


async def _put_examples(conn: AsyncConnection, found: Sequence[Caught]) -> None:
    for caught in found:
        for kind, kept in caught.kept.items():
            if kind not in caught.tally.examples:
                continue
            stored = {one.run.key: one for one in await read_runs(conn, [key for key, _ in kept])}
            caught.tally.examples[kind] = [
                example_of(one, caught.tally.condition, _visible(one), error)
                for key, error in kept
                if (one := stored.get(key)) is not None
            ]


def _visible(stored: StoredRun) -> Visible:
    return Visible(stored.run, unknown=stored.unknown)
