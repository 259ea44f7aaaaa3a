"""Putting policies into force, with their versions kept; and listing them."""

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncConnection
from uuid_utils.compat import uuid7

from domains.policies.files import PolicyDraft
from domains.policies.tables import policies

# Any number of this project's own; two appliers must not number the same version.
_LOCK_KEY = 0x706F6C6963696573

_DECIDES = ("effect", "severity", "condition")


class AppliedChange(Struct, frozen=True, kw_only=True):
    """What applying did to one policy; ``version`` is the one in force now, or the last one."""

    name: str
    tenant_id: str | None
    version: int
    change: Literal["created", "updated", "disabled", "enabled", "unchanged"]


async def apply_policies(conn: AsyncConnection, drafts: Sequence[PolicyDraft]) -> list[AppliedChange]:
    """Put *drafts* into force and return what changed, one for each, in order.

    A changed policy becomes a new version, a row of its own; the old row stays, disabled. What *drafts* does not name
    is left alone. Runs in the caller's transaction, and waits for another one that applies policies.
    """
    await conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    return [await _apply(conn, draft) for draft in drafts]


async def _apply(conn: AsyncConnection, draft: PolicyDraft) -> AppliedChange:
    row = policies.c
    named = (row.name == draft.name) & row.tenant_id.is_not_distinct_from(draft.tenant_id)
    newest = (
        (await conn.execute(select(policies).where(named).order_by(row.version.desc()).limit(1)))
        .mappings()
        .one_or_none()
    )
    version = newest["version"] if newest else 0
    same = newest is not None and all(newest[name] == getattr(draft, name) for name in _DECIDES)
    change: Literal["created", "updated", "disabled", "enabled", "unchanged"]
    if same and newest is not None:
        change = "unchanged" if newest["enabled"] == draft.enabled else "enabled" if draft.enabled else "disabled"
        if change != "unchanged":
            await conn.execute(
                update(policies).where(row.policy_id == newest["policy_id"]).values(enabled=draft.enabled)
            )
    else:
        version += 1
        change = "updated" if newest else "created"
        await conn.execute(update(policies).where(named, row.enabled).values(enabled=False))
        await conn.execute(insert(policies).values(_new_row(draft, version)))
    return AppliedChange(name=draft.name, tenant_id=draft.tenant_id, version=version, change=change)


def _new_row(draft: PolicyDraft, version: int) -> dict[str, Any]:
    return {
        "policy_id": uuid7(),
        "tenant_id": draft.tenant_id,
        "name": draft.name,
        "version": version,
        "enabled": draft.enabled,
        "created_at": func.clock_timestamp(),
        **{name: getattr(draft, name) for name in _DECIDES},
    }


async def list_policies(
    conn: AsyncConnection, *, tenant_id: str | None = None, all_versions: bool = False
) -> list[dict[str, Any]]:
    """Return the stored policies by tenant (those for all tenants first) and name, newest version first.

    With *tenant_id* those that apply to that tenant; without *all_versions* the newest version of each only.
    """
    row = policies.c
    query = select(policies).order_by(row.tenant_id.asc().nulls_first(), row.name, row.version.desc())
    if tenant_id is not None:
        query = query.where(row.tenant_id.is_(None) | (row.tenant_id == tenant_id))
    if not all_versions:
        query = query.ext(distinct_on(row.tenant_id, row.name))
    return [dict(found) for found in (await conn.execute(query)).mappings()]
