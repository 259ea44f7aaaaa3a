"""The tables of the contract's first version.

Revision: 0001, the first. Tables and columns carry their purpose as comments in the database; indexes too, below.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INDEX_PURPOSES = {
    "run_completions_unfinished": "Finds half-done legacy close-outs; holds nothing else, so it costs the atomic path "
    "nothing",
    "run_completions_received_at": "Time ranges for listing, reconciling and pruning; a BRIN costs almost nothing to "
    "keep",
    "outbox_events_last_of_run": "The relay''s way in, one entry a run: events leave in order, so a run''s last one is "
    "there to the end",
    "rollbacks_by_run": "Explains one run, and counts its attempts",
    "rollbacks_occurred_at": "Recent rollbacks, and pruning",
    "policies_tenant_id_name_version_key": "Two appliers cannot both make the next version",
    "traces_tenant_id_run_id_key": "A run has one trace; also finds the trace of a run",
}


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    op.create_table(
        "incidents",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("incident_id", sa.Uuid(), nullable=False, comment="UUIDv7; the id that events carry"),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("category", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False, comment="one line for a person"),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("agent_id", sa.Text(), nullable=True),
        sa.Column("is_synthetic", sa.Boolean(), nullable=False),
        sa.Column("synthetic_scenario_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('SUCCESS','FAILURE','BLOCKED','ABORTED')", name=op.f("incidents_outcome_check")
        ),
        sa.CheckConstraint(
            "severity IN ('NONE','LOW','MEDIUM','HIGH','CRITICAL')", name=op.f("incidents_severity_check")
        ),
        sa.CheckConstraint("status IN ('OPEN','CLOSED')", name=op.f("incidents_status_check")),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", name=op.f("incidents_pkey")),
        schema="governance",
        comment="What became of each run, success included; exactly one of incident and prevention record a run",
    )
    op.create_table(
        "outbox_events",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column(
            "sequence",
            sa.SmallInteger(),
            autoincrement=False,
            nullable=False,
            comment="1 to 3: the order within a run",
        ),
        sa.Column(
            "event_id",
            sa.Uuid(),
            nullable=False,
            comment="UUIDv7; never changes, however often it is published",
        ),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("routing_key", sa.Text(), nullable=False),
        sa.Column(
            "body",
            sa.Text(),
            nullable=False,
            comment="the CloudEvent as it goes out; text, so that no byte moves",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", "sequence", name=op.f("outbox_events_pkey")),
        schema="governance",
        comment="Events that are committed and not yet confirmed by the broker; empty when all is well",
    )
    op.create_index(
        "outbox_events_last_of_run",
        "outbox_events",
        ["created_at"],
        unique=False,
        schema="governance",
        postgresql_where=sa.text("sequence = 3"),
    )
    op.create_table(
        "policies",
        sa.Column("policy_id", sa.Uuid(), nullable=False, comment="UUIDv7; a new version of a policy is a new row"),
        sa.Column("tenant_id", sa.Text(), nullable=True, comment="null: applies to all tenants"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "version",
            sa.Integer(),
            nullable=False,
            comment="from 1; at most one version of a name is enabled",
        ),
        sa.Column("effect", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("condition", sa.Text(), nullable=False, comment="CEL over run"),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("effect IN ('flag','suppress_incident')", name=op.f("policies_effect_check")),
        sa.CheckConstraint(
            "severity IN ('NONE','LOW','MEDIUM','HIGH','CRITICAL')", name=op.f("policies_severity_check")
        ),
        sa.CheckConstraint("version >= 1", name=op.f("policies_version_check")),
        sa.PrimaryKeyConstraint("policy_id", name=op.f("policies_pkey")),
        sa.UniqueConstraint(
            "tenant_id",
            "name",
            "version",
            name=op.f("policies_tenant_id_name_version_key"),
            postgresql_nulls_not_distinct=True,
        ),
        schema="governance",
        comment="Rules over completed runs; reference data, small, read by every worker every few seconds",
    )
    op.create_table(
        "policy_evaluations",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("policy_evaluation_id", sa.Uuid(), nullable=False, comment="UUIDv7; the id that events carry"),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("policies_checked", sa.Integer(), nullable=False),
        sa.Column(
            "violations",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="the flag policies that were true",
        ),
        sa.Column(
            "errors",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="the policies whose condition failed to evaluate, and why",
        ),
        sa.Column("evaluated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('no_violation','violation','evaluation_error')",
            name=op.f("policy_evaluations_outcome_check"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", name=op.f("policy_evaluations_pkey")),
        schema="governance",
        comment="What the policies said about each run; one row a run",
    )
    op.create_table(
        "prevention_records",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("prevention_record_id", sa.Uuid(), nullable=False, comment="UUIDv7; the id that events carry"),
        sa.Column("policy_id", sa.Uuid(), nullable=False, comment="the suppress_incident policy that was true"),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", name=op.f("prevention_records_pkey")),
        schema="governance",
        comment="Written instead of an incident when a suppress_incident policy was true of a run that did not succeed",
    )
    op.create_table(
        "rollbacks",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("rollback_id", sa.Uuid(), nullable=False, comment="UUIDv7"),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="from 1, counted over all workers"),
        sa.Column("phase_reached", sa.Text(), nullable=False),
        sa.Column(
            "operations",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="what had been done, last first; ROLLBACK undid it",
        ),
        sa.Column("error_type", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "rollback_id", name=op.f("rollbacks_pkey")),
        schema="governance",
        comment="One row for each attempt to close out a run that was rolled back; written after the rollback",
    )
    op.create_index("rollbacks_by_run", "rollbacks", ["tenant_id", "run_id"], unique=False, schema="governance")
    op.create_index(
        "rollbacks_occurred_at",
        "rollbacks",
        ["occurred_at"],
        unique=False,
        schema="governance",
        postgresql_using="brin",
    )
    op.create_table(
        "run_completions",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("phase", sa.Text(), nullable=False, comment="the last phase that is completed"),
        sa.Column(
            "mode",
            sa.Text(),
            nullable=False,
            comment="which path closed it out: atomic, or legacy one write at a time",
        ),
        sa.Column(
            "payload_digest",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 of the message's canonical JSON",
        ),
        sa.Column("message_id", sa.Text(), nullable=True, comment="the AMQP message_id, where the runner set one"),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("cost_usd", sa.Numeric(), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), nullable=True),
        sa.Column("output_tokens", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "completed_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="the run's end, by the runner's clock",
        ),
        sa.Column("is_synthetic", sa.Boolean(), nullable=False),
        sa.Column("synthetic_scenario_id", sa.Text(), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "received_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="delivery to the worker, by the worker's clock",
        ),
        sa.Column(
            "committed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="null: a legacy close-out that has not finished",
        ),
        sa.Column(
            "events_published_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="every event of the run was confirmed by the broker",
        ),
        sa.CheckConstraint("mode IN ('atomic','legacy')", name=op.f("run_completions_mode_check")),
        sa.CheckConstraint(
            "phase IN ('NOT_STARTED','INCIDENT_CREATED','POLICY_EVALUATED','TRACE_COMPLETED','COMMITTED',"
            "'EVENTS_PUBLISHED')",
            name=op.f("run_completions_phase_check"),
        ),
        sa.CheckConstraint(
            "status IN ('succeeded','failed','halted','aborted')", name=op.f("run_completions_status_check")
        ),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", name=op.f("run_completions_pkey")),
        schema="governance",
        comment="The inbox: one row a run, claimed by INSERT ON CONFLICT; its key is what makes a delivery happen once",
        postgresql_with={"fillfactor": "85"},
    )
    op.create_index(
        "run_completions_received_at",
        "run_completions",
        ["received_at"],
        unique=False,
        schema="governance",
        postgresql_using="brin",
    )
    op.create_index(
        "run_completions_unfinished",
        "run_completions",
        ["received_at"],
        unique=False,
        schema="governance",
        postgresql_where=sa.text("committed_at IS NULL"),
    )
    op.create_table(
        "traces",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False, comment="running until the run's completion is known"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True, comment="null while running"),
        sa.Column(
            "steps",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="[]",
            nullable=False,
            comment="the message's steps, in order",
        ),
        sa.CheckConstraint("status IN ('running','completed','failed','aborted')", name=op.f("traces_status_check")),
        sa.PrimaryKeyConstraint("tenant_id", "trace_id", name=op.f("traces_pkey")),
        sa.UniqueConstraint("tenant_id", "run_id", name=op.f("traces_tenant_id_run_id_key")),
        schema="governance",
        comment="One execution trace a run that was traced; a complete trace is never changed",
    )
    for index, purpose in INDEX_PURPOSES.items():
        op.execute(f"COMMENT ON INDEX governance.{index} IS '{purpose}'")


def downgrade() -> None:
    """Undo the expansion."""
    op.drop_table("traces", schema="governance")
    op.drop_index(
        "run_completions_unfinished",
        table_name="run_completions",
        schema="governance",
        postgresql_where=sa.text("committed_at IS NULL"),
    )
    op.drop_index(
        "run_completions_received_at",
        table_name="run_completions",
        schema="governance",
        postgresql_using="brin",
    )
    op.drop_table("run_completions", schema="governance")
    op.drop_index("rollbacks_occurred_at", table_name="rollbacks", schema="governance", postgresql_using="brin")
    op.drop_index("rollbacks_by_run", table_name="rollbacks", schema="governance")
    op.drop_table("rollbacks", schema="governance")
    op.drop_table("prevention_records", schema="governance")
    op.drop_table("policy_evaluations", schema="governance")
    op.drop_table("policies", schema="governance")
    op.drop_index(
        "outbox_events_last_of_run",
        table_name="outbox_events",
        schema="governance",
        postgresql_where=sa.text("sequence = 3"),
    )
    op.drop_table("outbox_events", schema="governance")
    op.drop_table("incidents", schema="governance")
