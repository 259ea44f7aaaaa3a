"""Evaluates policies on a span of stored runs. Its parameters and results are small: they pass between processes."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import NoReturn, get_args
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.policy_analysis.row_keys import NoKeyError, row_key
from consumer.policy_analysis.tally import EXAMPLES, Count
from consumer.runs.pages import Span
from consumer.runs.stored import (
    OUTCOME,
    PREVENTED_BY,
    RUN,
    STATUS,
    TENANT,
    VIOLATIONS,
    Columns,
    StoredRow,
    read_span,
    violations_in,
)
from domains.policies.cel.conditions import Condition
from domains.policies.cel.visible import FIELDS, Visible
from domains.policies.explain import Answer, ask
from domains.policies.files import PolicyDraft
from domains.run import RunKey

Name = tuple[str | None, str]

# Remembered answers of one policy, and characters of a key: 10 MB at most.
_ANSWERS_MAX, _KEY_MAX = 10_000, 500


@dataclass(slots=True)
class InForce:
    """The results of the policies that were enforced when the runs were closed out."""

    flagged: int = 0
    suppressed: int = 0
    errors: int = 0


@dataclass(slots=True)
class Hits:
    """The results of one policy: counts by tenant, and the first runs of each kind in :data:`EXAMPLES`."""

    tenants: dict[str, Count] = field(default_factory=dict)
    examples: dict[str, list[RunKey]] = field(default_factory=lambda: {name: [] for name in EXAMPLES})


@dataclass(slots=True)
class Results:
    """The results of all policies on some runs."""

    policies: list[Hits]
    runs: int = 0
    in_force: InForce = field(default_factory=InForce)

    def add(self, later: "Results", limit: int) -> None:
        """Add the results on the runs that follow these; keep at most *limit* examples of each kind."""
        self.runs += later.runs
        for name in InForce.__slots__:
            setattr(self.in_force, name, getattr(self.in_force, name) + getattr(later.in_force, name))
        for hits, more in zip(self.policies, later.policies, strict=True):
            for tenant, count in more.tenants.items():
                hits.tenants.setdefault(tenant, Count()).add(count)
            for kind, keys in more.examples.items():
                hits.examples[kind] += keys[: limit - len(hits.examples[kind])]


class Evaluation:
    """Policies to evaluate on stored runs of all tenants, or of one.

    *names* are those of the versions that were enforced; *limit* is the number of examples of each kind.
    """

    def __init__(
        self, drafts: Sequence[PolicyDraft], names: dict[UUID, Name], *, tenant: str | None, limit: int
    ) -> None:
        self._parameters = (drafts, names, tenant, limit)
        conditions = [Condition(draft.condition) for draft in drafts]
        read, needed = _fields_of(conditions)
        self.columns = Columns(read)
        self._reader = _Reader(self.columns, needed)
        self._policies = [_Policy(*pair, self.columns) for pair in zip(drafts, conditions, strict=True)]
        self._names = names
        self._tenant = tenant
        self._limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        """Compiled conditions cannot be copied to another process: it compiles them again."""
        drafts, names, tenant, limit = self._parameters
        return _evaluation, (drafts, names, tenant, limit)

    @property
    def remembered(self) -> list[int]:
        """The number of answers that each policy remembers."""
        return [policy.remembered for policy in self._policies]

    def none(self) -> Results:
        """Return the results on no run."""
        return Results([Hits() for _ in self._policies])

    async def of_span(self, conn: AsyncConnection, span: Span) -> Results:
        """Return the results on the runs of *span*; its transactions are short."""
        results = self.none()
        async for rows in read_span(conn, span, self._tenant, self.columns):
            self.add(rows, results)
        return results

    def add(self, rows: Sequence[StoredRow], results: Results) -> None:
        """Add the results on *rows* of :attr:`columns` to *results*."""
        results.runs += len(rows)
        # The policies that decided, by the place of the run.
        flagged, prevented = dict[int, set[Name | None]](), dict[int, set[Name | None]]()
        for place, row in enumerate(rows):
            if row[VIOLATIONS] != "[]" and (violations := violations_in(row[VIOLATIONS])):
                flagged[place] = {self._names.get(policy_id) for policy_id in violations}
            if row[PREVENTED_BY] is not None:
                prevented[place] = {self._names.get(row[PREVENTED_BY])}
            if row[OUTCOME] == "evaluation_error":
                results.in_force.errors += 1
        results.in_force.flagged += len(flagged)
        results.in_force.suppressed += len(prevented)
        self._reader.read(rows)
        for policy, hits in zip(self._policies, results.policies, strict=True):
            deciding = flagged if policy.draft.effect == "flag" else prevented
            policy.add(rows, self._reader, deciding, hits, self._limit)


class _Reader:
    """The runs of some rows as conditions see them: converted once for all policies, and only if one needs it."""

    def __init__(self, columns: Columns, needed: frozenset[str]) -> None:
        self._columns = columns
        self._needed = needed
        self._rows: Sequence[StoredRow] = ()
        self._visible: dict[int, Visible] = {}

    def read(self, rows: Sequence[StoredRow]) -> None:
        """Read *rows* from now on."""
        self._rows, self._visible = rows, {}

    def visible(self, place: int) -> Visible:
        """Return the run of the row at *place* as conditions see it."""
        if place not in self._visible:
            stored = self._columns.run_of(self._rows[place])
            self._visible[place] = Visible(stored.run, unknown=stored.unknown, needed=self._needed)
        return self._visible[place]


class _Policy:
    """A policy, and its answers by what the condition read: many runs are alike in that."""

    def __init__(self, draft: PolicyDraft, condition: Condition, columns: Columns) -> None:
        self.draft = draft
        self._condition = condition
        self._key_of = row_key(condition, columns) or _no_key
        self._known: dict[Hashable, Answer] = {}

    def add(
        self,
        rows: Sequence[StoredRow],
        reader: _Reader,
        deciding: Mapping[int, set[Name | None]],
        hits: Hits,
        limit: int,
    ) -> None:
        """Add the results on *rows* to *hits*; *deciding* has the policies that decided, by the place of the run."""
        draft = self.draft
        name, only, suppresses = (draft.tenant_id, draft.name), draft.tenant_id, draft.effect == "suppress_incident"
        key_of, known = self._key_of, self._known
        kinds: dict[tuple[str, str, bool], int] = defaultdict(int)
        for place, row in enumerate(rows):
            tenant = row[TENANT]
            if only is not None and only != tenant:
                continue
            try:
                answer = known[key_of(row)]
            except (KeyError, NoKeyError):
                answer = self._ask(row, reader.visible(place))
            did = place in deciding and name in deciding[place]
            kind = _KINDS[answer, not suppresses or row[STATUS] != "succeeded", did]
            kinds[tenant, kind, did] += 1
            if kind in hits.examples and len(hits.examples[kind]) < limit:
                hits.examples[kind].append(RunKey(tenant, row[RUN]))
        for (tenant, kind, did), number in kinds.items():
            hits.tenants.setdefault(tenant, Count()).note(kind, did=did, runs=number)

    @property
    def remembered(self) -> int:
        return len(self._known)

    def _ask(self, row: StoredRow, visible: Visible) -> Answer:
        """Return the answer on *row*, and remember it if it has a short key."""
        answer = ask(self._condition, visible).answer
        with suppress(NoKeyError):
            key = self._key_of(row)
            if len(self._known) >= _ANSWERS_MAX:
                self._known.clear()
            if len(repr(key)) <= _KEY_MAX:
                self._known[key] = answer
        return answer


def _no_key(_row: StoredRow) -> NoReturn:
    raise NoKeyError


def _evaluation(drafts: Sequence[PolicyDraft], names: dict[UUID, Name], tenant: str | None, limit: int) -> Evaluation:
    return Evaluation(drafts, names, tenant=tenant, limit=limit)


def _fields_of(conditions: Sequence[Condition]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the fields of a run to read, and those that *conditions* see.

    The size of a run, on which the cost of an expensive condition depends, is that of all its fields.
    """
    reads = [condition.reads.fields for condition in conditions]
    needed = reduce(frozenset.union, [FIELDS if fields is None else fields for fields in reads], frozenset[str]())
    return FIELDS if any(condition.depends_on_size for condition in conditions) else needed, needed


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


# By the answer, whether the policy acts on the run, and whether one of its name did.
_KINDS = {
    (answer, acts, did): _kind(answer, acts=acts, did=did)
    for answer in get_args(Answer)
    for acts in (True, False)
    for did in (True, False)
}
