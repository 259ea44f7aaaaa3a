"""The tables of policies and of their evaluations."""

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from domains.database.schema import metadata

_UTC = DateTime(timezone=True)

policies = Table(
    "policies",
    metadata,
    Column("policy_id", Uuid, primary_key=True, comment="UUIDv7; a new version of a policy is a new row"),
    Column("tenant_id", Text, comment="null: applies to all tenants"),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False, comment="from 1; at most one version of a name is enabled"),
    Column("effect", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("condition", Text, nullable=False, comment="CEL over run"),
    Column("enabled", Boolean, nullable=False),
    Column("created_at", _UTC, nullable=False, server_default=text("now()")),
    Column("shadow", Text, comment="running or ended: a version that is only counted, never enabled; null: the others"),
    UniqueConstraint(
        "tenant_id",
        "name",
        "version",
        postgresql_nulls_not_distinct=True,
        info={"purpose": "Two appliers cannot both make the next version"},
    ),
    CheckConstraint("effect IN ('flag','suppress_incident')", name="effect"),
    CheckConstraint("severity IN ('NONE','LOW','MEDIUM','HIGH','CRITICAL')", name="severity"),
    CheckConstraint("version >= 1", name="version"),
    # An older worker without shadow policies enforces every enabled row.
    CheckConstraint("shadow IS NULL OR (shadow IN ('running','ended') AND NOT enabled)", name="shadow"),
    comment="Rules over completed runs; reference data, small, read by every worker every few seconds",
)

policy_evaluations = Table(
    "policy_evaluations",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("policy_evaluation_id", Uuid, nullable=False, comment="UUIDv7; the id that events carry"),
    Column("outcome", Text, nullable=False),
    Column("policies_checked", Integer, nullable=False),
    Column("violations", JSONB, nullable=False, comment="the flag policies that were true"),
    Column("errors", JSONB, nullable=False, comment="the policies whose condition failed to evaluate, and why"),
    Column("evaluated_at", _UTC, nullable=False),
    Column("shadow", JSONB, comment="what policies in shadow would have done, or their errors; null: nothing"),
    CheckConstraint("outcome IN ('no_violation','violation','evaluation_error')", name="outcome"),
    comment="What the policies said about each run; one row a run",
)
