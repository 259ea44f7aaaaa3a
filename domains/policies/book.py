"""The policies in force, read again every few seconds, compiled once a version."""

from time import monotonic
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.policies.conditions import Condition, ConditionError
from domains.policies.rules import Policy, PolicySet
from domains.policies.tables import policies

# Seconds until a change of a policy reaches every worker.
MAX_AGE_SECONDS = 5.0

_FIELDS = ("policy_id", "tenant_id", "name", "version", "effect", "severity", "condition")
_IN_FORCE = select(*[policies.c[name] for name in _FIELDS]).where(policies.c.enabled)

_Compiled = Condition | ConditionError


class PolicyBook:
    """Gives out the set of policies in force; an unchanged policy is never compiled twice."""

    def __init__(self, *, max_age_seconds: float = MAX_AGE_SECONDS) -> None:
        self._max_age = max_age_seconds
        self._read_at = float("-inf")
        self._known = False
        self._set = PolicySet(())
        self._compiled: dict[tuple[UUID, int, str], _Compiled] = {}

    async def current(self, conn: AsyncConnection) -> PolicySet:
        """Return the policies in force, reading them on *conn* if they were last read too long ago.

        If reading fails the error passes through, for the caller's transaction is broken by then.
        """
        now = monotonic()
        if now < self._read_at + self._max_age:
            return self._set
        # Of several transactions at once only one reads again, the others use what was known; but until something is
        # known each reads for itself, or the first runs after a start would be evaluated against nothing.
        if self._known:
            self._read_at = now
        try:
            rows = (await conn.execute(_IN_FORCE)).mappings().all()
        except BaseException:
            self._read_at = float("-inf")
            raise
        self._set = self._compile([Policy(**row) for row in rows])
        self._known, self._read_at = True, now
        return self._set

    def _compile(self, found: list[Policy]) -> PolicySet:
        kept: dict[tuple[UUID, int, str], _Compiled] = {}
        for policy in found:
            key = (policy.policy_id, policy.version, policy.condition)
            kept[key] = self._compiled.get(key) or compiled(policy.condition)
        self._compiled = kept
        return PolicySet((policy, kept[policy.policy_id, policy.version, policy.condition]) for policy in found)


def compiled(text: str) -> _Compiled:
    """Return *text* compiled, or why it does not compile: one broken row must not stop the others."""
    try:
        return Condition(text)
    except ConditionError as error:
        return error
