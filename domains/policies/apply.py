"""Applies policies as new versions, and lists them."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct
from sqlalchemy import ColumnElement, RowMapping, func, insert, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from uuid_utils.compat import uuid7

from domains.policies.files import PolicyDraft
from domains.policies.rules import Mode
from domains.policies.tables import policies

# Advisory lock: two appliers must not assign the same version.
_LOCK_KEY = 0x706F6C6963696573

_DECIDES = ("effect", "severity", "condition")

_Change: TypeAlias = Literal["created", "updated", "disabled", "enabled", "unchanged"]


class AppliedChange(Struct, frozen=True, kw_only=True):
    """The change to one policy: ``version`` is the one in the file, in ``mode``.

    ``in_force`` is the version that is now enforced, null if none is.
    """

    name: str
    tenant_id: str | None
    version: int
    change: _Change
    mode: Mode
    enabled: bool
    in_force: int | None


async def apply_policies(conn: AsyncConnection, drafts: Sequence[PolicyDraft]) -> list[AppliedChange]:
    """Apply *drafts* and return one change for each, in order.

    A changed policy becomes a new version in a new row; the old row is kept, disabled. A shadow version leaves the
    enforced one in place, so that they can be compared; an enforced version replaces both. Policies that are not in
    *drafts* are unchanged.

    Runs in the caller's transaction, and waits for other transactions that apply policies.
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
    change = _change(draft, newest)
    version = newest["version"] if newest else 0
    if change in {"created", "updated"}:
        version += 1
        await _retire(conn, named, shadows_only=draft.mode == "shadow")
        await conn.execute(insert(policies).values(_new_row(draft, version)))
    elif newest is not None and change != "unchanged":
        await conn.execute(update(policies).where(row.policy_id == newest["policy_id"]).values(_state(draft)))
    in_force = (await conn.execute(select(row.version).where(named, row.enabled))).scalar_one_or_none()
    return AppliedChange(
        name=draft.name,
        tenant_id=draft.tenant_id,
        version=version,
        change=change,
        mode=draft.mode,
        enabled=draft.enabled,
        in_force=in_force,
    )


def _change(draft: PolicyDraft, newest: RowMapping | None) -> _Change:
    if newest is None:
        return "created"
    mode = "enforce" if newest["shadow"] is None else "shadow"
    if mode != draft.mode or any(newest[name] != getattr(draft, name) for name in _DECIDES):
        return "updated"
    if (newest["enabled"] or newest["shadow"] == "running") == draft.enabled:
        return "unchanged"
    return "enabled" if draft.enabled else "disabled"


async def _retire(conn: AsyncConnection, named: ColumnElement[bool], *, shadows_only: bool) -> None:
    await conn.execute(update(policies).where(named, policies.c.shadow == "running").values(shadow="ended"))
    if not shadows_only:
        await conn.execute(update(policies).where(named, policies.c.enabled).values(enabled=False))


def _state(draft: PolicyDraft) -> dict[str, Any]:
    if draft.mode == "shadow":
        return {"enabled": False, "shadow": "running" if draft.enabled else "ended"}
    return {"enabled": draft.enabled, "shadow": None}


def _new_row(draft: PolicyDraft, version: int) -> dict[str, Any]:
    return {
        "policy_id": uuid7(),
        "tenant_id": draft.tenant_id,
        "name": draft.name,
        "version": version,
        "created_at": func.clock_timestamp(),
        **_state(draft),
        **{name: getattr(draft, name) for name in _DECIDES},
    }


async def list_policies(
    conn: AsyncConnection, *, tenant_id: str | None = None, all_versions: bool = False
) -> list[dict[str, Any]]:
    """Return the stored policies by tenant (those for all tenants first) and name, newest version first.

    With *tenant_id* those that apply to that tenant; without *all_versions* the newest version of each, and the
    enforced version if that is an older one.
    """
    row = policies.c
    query = select(policies).order_by(row.tenant_id.asc().nulls_first(), row.name, row.version.desc())
    if tenant_id is not None:
        query = query.where(row.tenant_id.is_(None) | (row.tenant_id == tenant_id))
    if not all_versions:
        newer = policies.alias("newer")
        newest = ~(
            select(newer.c.version)
            .where(newer.c.tenant_id.is_not_distinct_from(row.tenant_id), newer.c.name == row.name)
            .where(newer.c.version > row.version)
            .exists()
        )
        query = query.where(or_(newest, row.enabled))
    return [dict(found) for found in (await conn.execute(query)).mappings()]
