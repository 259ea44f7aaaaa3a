"""The enforced and shadow policies, reloaded every few seconds, each version compiled once."""

import asyncio
from time import monotonic

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.policies.cel.conditions import Condition, ConditionError
from domains.policies.rules import Policy, PolicySet
from domains.policies.tables import policies

# Seconds until a changed policy reaches every worker.
MAX_AGE_SECONDS = 5.0
# Conditions, a millisecond each, between two yields to the event loop: at a start there may be a thousand.
_COMPILED_AT_ONCE = 8

_FIELDS = ("policy_id", "tenant_id", "name", "version", "effect", "severity", "condition")
_IN_FORCE = select(*[policies.c[name] for name in _FIELDS], policies.c.shadow.is_not(None).label("shadow")).where(
    or_(policies.c.enabled, policies.c.shadow == "running")
)

_Compiled = Condition | ConditionError


class PolicyBook:
    """Returns the current policies; an unchanged policy is never compiled twice."""

    def __init__(self, *, max_age_seconds: float = MAX_AGE_SECONDS) -> None:
        self._max_age = max_age_seconds
        self._read_at = float("-inf")
        self._known = False
        self._set = PolicySet(())
        self._compiled: dict[str, _Compiled] = {}

    async def current(self, conn: AsyncConnection) -> PolicySet:
        """Return the enforced and shadow policies, reloading them on *conn* if they are out of date.

        A read error is raised, because the caller's transaction has failed with it.
        """
        now = monotonic()
        if now < self._read_at + self._max_age:
            return self._set
        # One of several concurrent transactions reloads; the others use the known policies. Until some are known, each
        # reads for itself, or the first runs after a start would be evaluated without policies.
        if self._known:
            self._read_at = now
        try:
            rows = (await conn.execute(_IN_FORCE)).mappings().all()
            self._set = await self._compile([Policy(**row) for row in rows])
        except BaseException:
            self._read_at = float("-inf")
            raise
        self._known, self._read_at = True, now
        return self._set

    async def _compile(self, found: list[Policy]) -> PolicySet:
        for fresh, text in enumerate({policy.condition for policy in found} - self._compiled.keys(), 1):
            # Another reader may have compiled it meanwhile.
            if text not in self._compiled:
                self._compiled[text] = compiled(text)
            if fresh % _COMPILED_AT_ONCE == 0:
                await asyncio.sleep(0)
        in_force = {
            policy.condition: self._compiled.get(policy.condition) or compiled(policy.condition) for policy in found
        }
        self._compiled = in_force
        return PolicySet((policy, in_force[policy.condition]) for policy in found)


def compiled(text: str) -> _Compiled:
    """Return the compiled *text*, or why it does not compile: one invalid row must not stop the others."""
    try:
        return Condition(text)
    except ConditionError as error:
        return error
