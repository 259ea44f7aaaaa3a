"""The tables of the close-out itself: the inbox of runs, the outbox of events, the record of rollbacks."""

from sqlalchemy import BigInteger as Big
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from domains.database.schema import metadata

_UTC = DateTime(timezone=True)

# Events per run: incident (or prevention record), evaluation, and run.finalized.
EVENTS_PER_RUN = 3
# Bytes of one event. RabbitMQ 4 refuses a message above 16 MiB by default; an event has a few hundred.
EVENT_MAX_BYTES = 16 * 1024 * 1024

run_completions = Table(
    "run_completions",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("agent_id", Text),
    Column("status", Text, nullable=False),
    Column("error_code", Text),
    Column("phase", Text, nullable=False, comment="the last phase that is completed"),
    Column(
        "mode",
        Text,
        nullable=False,
        comment="which path closed it out: atomic, or legacy one write at a time",
    ),
    Column("payload_digest", LargeBinary, nullable=False, comment="SHA-256 of the message's canonical JSON"),
    Column("message_id", Text, comment="the AMQP message_id, where the runner set one"),
    Column("model", Text),
    Column("cost_usd", Numeric),
    Column("input_tokens", Big),
    Column("output_tokens", Big),
    Column("started_at", _UTC, nullable=False),
    Column("completed_at", _UTC, nullable=False, comment="the run's end, by the runner's clock"),
    Column("is_synthetic", Boolean, nullable=False),
    Column("synthetic_scenario_id", Text),
    Column("metadata", JSONB, nullable=False),
    Column("received_at", _UTC, nullable=False, comment="delivery to the worker, by the worker's clock"),
    Column("committed_at", _UTC, comment="null: a legacy close-out that has not finished"),
    Column("events_published_at", _UTC, comment="every event of the run was confirmed by the broker"),
    Column("run_ref", Text, comment="the runner's id of the run where it is not a UUID; run_id is derived"),
    Column("cached_input_tokens", Big),
    Column("step_count", Integer, comment="steps of the message; null: without a trace, or stored before 0007"),
    Column("parent_run_id", Text, comment="the run that started this one: its run_ref, or its run_id"),
    Column("session_id", Text, comment="the conversation that the run belongs to"),
    Column(
        "adjustments",
        JSONB,
        comment="what was changed, cut or dropped of the message: a list of field, found, stored; null: nothing",
    ),
    CheckConstraint("status IN ('succeeded','failed','halted','aborted')", name="status"),
    CheckConstraint("mode IN ('atomic','legacy')", name="mode"),
    CheckConstraint(
        "phase IN ('NOT_STARTED','INCIDENT_CREATED','POLICY_EVALUATED','TRACE_COMPLETED','COMMITTED',"
        "'EVENTS_PUBLISHED')",
        name="phase",
    ),
    # Each row is updated once, by the mark; free space on the page makes that a HOT update.
    postgresql_with={"fillfactor": "85"},
    comment="The inbox: one row a run, claimed by INSERT ON CONFLICT; its key is what makes a delivery happen once",
)

Index(
    "run_completions_unfinished",
    run_completions.c.received_at,
    postgresql_where=run_completions.c.committed_at.is_(None),
    info={"purpose": "Finds half-done legacy close-outs; holds nothing else, so it costs the atomic path nothing"},
)
Index(
    "run_completions_received_at",
    run_completions.c.received_at,
    postgresql_using="brin",
    postgresql_with={"autosummarize": "on"},
    info={"purpose": "Time ranges for listing, reconciling and pruning; a BRIN costs almost nothing to keep"},
)

for _name in ("parent_run_id", "session_id"):
    Index(
        f"run_completions_{_name}",
        run_completions.c.tenant_id,
        run_completions.c[_name],
        postgresql_where=run_completions.c[_name].is_not(None),
        info={"purpose": "Finds the runs of a parent or a session; holds nothing else, so it costs others nothing"},
    )

# No foreign key to the inbox: the claim in the same transaction is the guarantee, and a key would cost three lookups
# and a row lock per run.
outbox_events = Table(
    "outbox_events",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column(
        "sequence",
        SmallInteger,
        primary_key=True,
        autoincrement=False,
        comment="1 to 3: the order within a run",
    ),
    Column("event_id", Uuid, nullable=False, comment="UUIDv7; never changes, however often it is published"),
    Column("type", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("body", Text, nullable=False, comment="the CloudEvent as it goes out; text, so that no byte moves"),
    Column("created_at", _UTC, nullable=False, server_default=text("clock_timestamp()")),
    Column(
        "set_aside_until",
        _UTC,
        comment="on a run's last event: it could not be published, and is tried again then; null: not set aside",
    ),
    Column("set_aside_reason", Text, comment="why it could not be published"),
    # Limits of a RabbitMQ message; a row that exceeds them could never be published.
    CheckConstraint(
        f"octet_length(routing_key) <= 255 AND octet_length(type) <= 255"
        f" AND octet_length(body) <= {EVENT_MAX_BYTES} AND left(body, 1) = '{{'",
        name="publishable",
    ),
    comment="Events that are committed and not yet confirmed by the broker; empty when all is well",
)

Index(
    "outbox_events_last_of_run",
    outbox_events.c.created_at,
    postgresql_where=text(f"sequence = {EVENTS_PER_RUN}"),
    info={
        "purpose": "The relay's way in, one entry a run: events leave in order, so a run's last one is there to the end"
    },
)

Index(
    "outbox_events_set_aside",
    outbox_events.c.set_aside_until,
    postgresql_where=outbox_events.c.set_aside_until.is_not(None),
    info={"purpose": "Counts the runs whose events are set aside; empty when all is well"},
)

rollbacks = Table(
    "rollbacks",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("rollback_id", Uuid, primary_key=True, comment="UUIDv7"),
    Column("run_id", Uuid, nullable=False),
    Column("attempt", Integer, nullable=False, comment="from 1, counted over all workers"),
    Column("phase_reached", Text, nullable=False),
    Column("operations", JSONB, nullable=False, comment="what had been done, last first; ROLLBACK undid it"),
    Column("error_type", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("occurred_at", _UTC, nullable=False),
    comment="One row for each attempt to close out a run that was rolled back; written after the rollback",
)

Index(
    "rollbacks_by_run",
    rollbacks.c.tenant_id,
    rollbacks.c.run_id,
    info={"purpose": "Explains one run, and counts its attempts"},
)
Index(
    "rollbacks_occurred_at",
    rollbacks.c.occurred_at,
    postgresql_using="brin",
    postgresql_with={"autosummarize": "on"},
    info={"purpose": "Recent rollbacks, and pruning"},
)
