"""The run-completed message, version 1, as typed and frozen values.

These types are the single source of the message contract: they decode the wire format, they generate its
JSON Schema, and the domains read them. Only shape and single-field limits are here; rules that relate two
fields, and what is accepted beyond them, are in ``consumer/contract``.
"""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

from msgspec import Meta, Struct, field

# PostgreSQL's bigint.
BIGINT_MAX = 2**63 - 1

TENANT_PATTERN = r"[A-Za-z0-9._:@+~=-]{1,128}"
TenantId = Annotated[
    str,
    Meta(
        pattern=rf"^{TENANT_PATTERN}\Z",
        description="Owns everything below: 1 to 128 of A-Z a-z 0-9 . _ - : @ + ~ =",
        examples=["acme-eu"],
    ),
]
ErrorCode = Annotated[
    str,
    Meta(
        pattern=r"^[A-Z][A-Z0-9_]{0,63}\Z",
        description="An open set: upper case, digits and _, at most 64 characters",
        examples=["EXECUTION_TIMEOUT"],
    ),
]
Moment = Annotated[datetime, Meta(tz=True, description="RFC 3339 with an offset", examples=["2026-11-01T12:00:00Z"])]
Money = Annotated[Decimal, Meta(description="US dollars, a decimal >= 0", examples=["0.0125"])]
Tokens = Annotated[int, Meta(ge=0, le=BIGINT_MAX)]
Milliseconds = (
    Annotated[int, Meta(ge=0, le=BIGINT_MAX, description="milliseconds")]
    | Annotated[float, Meta(ge=0, le=BIGINT_MAX, description="milliseconds, with a fraction")]
)
# Characters of a short text.
TEXT_MAX = 1_024
ShortText = Annotated[str, Meta(max_length=TEXT_MAX)]
# Steps of a run that are stored.
STEPS_MAX = 10_000
# Steps of a run that conditions see.
VISIBLE_STEPS = 1_000

RunStatus = Literal["succeeded", "failed", "halted", "aborted"]
StepStatus = Literal["succeeded", "failed", "skipped", "unknown"]


class RunKey(NamedTuple):
    """A run's identity everywhere: ``run_id`` is unique within a tenant only."""

    tenant_id: str
    run_id: UUID


class Usage(Struct, frozen=True, kw_only=True):
    """The run's consumption; null if the runner did not measure it."""

    cost_usd: Money | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    cached_input_tokens: Annotated[Tokens, Meta(description="The part of input_tokens read from a cache")] | None = None


class Step(Struct, frozen=True, kw_only=True):
    """One step of a run."""

    index: Annotated[int, Meta(ge=0, le=2**31 - 1, description="From 0, unique within the run")]
    skill: str | None = None
    status: StepStatus
    duration_ms: Milliseconds | None = None
    cost_usd: Money | None = None
    error_code: ErrorCode | None = None
    kind: Annotated[ShortText, Meta(description="What the step is", examples=["llm", "tool"])] | None = None
    started_at: Moment | None = None
    model: ShortText | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    error_message: str | None = None


class CompletedRun(Struct, frozen=True, kw_only=True):
    """A run has completed: the body of a message with routing key ``run.completed``."""

    schema_version: Literal[1]
    tenant_id: TenantId
    run_id: Annotated[UUID, Meta(description="Unique within its tenant")]
    agent_id: ShortText | None = None
    status: Annotated[RunStatus, Meta(description="halted: stopped by a rule or budget; aborted: stopped by a person")]
    error_code: ErrorCode | None = None
    error_message: Annotated[str, Meta(description="Any Unicode except NUL")] | None = None
    trace_id: Annotated[UUID, Meta(description="Null: the run has no trace")] | None = None
    started_at: Moment
    completed_at: Moment
    usage: Usage = field(default_factory=Usage)
    model: ShortText | None = None
    steps: Annotated[tuple[Step, ...], Meta(max_length=STEPS_MAX)] = ()
    is_synthetic: bool = False
    synthetic_scenario_id: ShortText | None = None
    metadata: Annotated[dict[str, Any], Meta(max_length=1000)] = field(default_factory=dict)
    parent_run_id: Annotated[ShortText, Meta(description="The run that started this one")] | None = None
    session_id: Annotated[ShortText, Meta(description="The conversation that the run belongs to")] | None = None
    # Not a field of the message: the text of a run_id that is not a UUID.
    run_ref: str | None = None

    @property
    def key(self) -> RunKey:
        """The identity under which everything of this run is stored."""
        return RunKey(self.tenant_id, self.run_id)

    @property
    def step_count(self) -> int:
        """The number of steps; conditions see the first ``VISIBLE_STEPS`` of them."""
        return len(self.steps)

    @property
    def duration_ms(self) -> int:
        """Time from start to completion, in whole milliseconds; 0 if two clocks differ by more than that."""
        return max(0, (self.completed_at - self.started_at) // timedelta(milliseconds=1))
