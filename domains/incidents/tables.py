"""The tables of incidents and of prevention records."""

from sqlalchemy import Boolean, CheckConstraint, Column, DateTime, Table, Text, Uuid

from domains.database.schema import metadata

_UTC = DateTime(timezone=True)

incidents = Table(
    "incidents",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("incident_id", Uuid, nullable=False, comment="UUIDv7; the id that events carry"),
    Column("outcome", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("title", Text, nullable=False, comment="one line for a person"),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("agent_id", Text),
    Column("is_synthetic", Boolean, nullable=False),
    Column("synthetic_scenario_id", Text),
    Column("created_at", _UTC, nullable=False),
    CheckConstraint("outcome IN ('SUCCESS','FAILURE','BLOCKED','ABORTED')", name="outcome"),
    CheckConstraint("severity IN ('NONE','LOW','MEDIUM','HIGH','CRITICAL')", name="severity"),
    CheckConstraint("status IN ('OPEN','CLOSED')", name="status"),
    comment="What became of each run, success included; exactly one of incident and prevention record a run",
)

prevention_records = Table(
    "prevention_records",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("prevention_record_id", Uuid, nullable=False, comment="UUIDv7; the id that events carry"),
    Column("policy_id", Uuid, nullable=False, comment="the suppress_incident policy that was true"),
    Column("error_code", Text),
    Column("created_at", _UTC, nullable=False),
    comment="Written instead of an incident when a suppress_incident policy was true of a run that did not succeed",
)
