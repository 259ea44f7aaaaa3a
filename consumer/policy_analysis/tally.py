"""The results of a policy on many runs: counts by tenant, and examples."""

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from msgspec import Struct

from consumer.runs.stored import StoredRun
from domains.policies.cel.conditions import Condition, ConditionError
from domains.policies.cel.visible import Visible
from domains.policies.explain import Value, values_read
from domains.policies.files import PolicyDraft

EXAMPLES = ("newly", "again", "no_longer", "errors")


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

    def note(self, kind: str, *, did: bool, runs: int = 1) -> None:
        """Count *runs* of one kind; *did*: a policy of this name flagged or suppressed them."""
        self.runs += runs
        self.hits += runs * (kind in {"again", "newly"})
        self.newly += runs * (kind == "newly")
        # A failed condition does not flag either.
        self.no_longer += runs * (did and kind in {"no_longer", "errors"})
        self.errors += runs * (kind == "errors")
        self.unknown += runs * (kind == "unknown")

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


# The quantile of the normal distribution that leaves 2.5 % on each side.
_Z_95 = 1.959964


def share_between(hits: int, runs: int) -> tuple[float, float]:
    """Return the bounds of the share of hits among all runs, from a random sample, with a confidence of 95 %.

    The interval of E. B. Wilson (Journal of the American Statistical Association 22, 1927), which also holds for shares
    near 0 and 1.
    """
    if not runs:
        return 0.0, 1.0
    share, square = hits / runs, _Z_95**2 / runs
    middle, half = share + square / 2, _Z_95 * ((share * (1 - share) + square / 4) / runs) ** 0.5
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


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
