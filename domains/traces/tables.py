"""The table of traces."""

from sqlalchemy import CheckConstraint, Column, DateTime, Table, Text, UniqueConstraint, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from domains.database.schema import metadata

_UTC = DateTime(timezone=True)

traces = Table(
    "traces",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("trace_id", Uuid, primary_key=True),
    Column("run_id", Uuid, nullable=False),
    Column("agent_id", Text),
    Column("status", Text, nullable=False, comment="running until the run's completion is known"),
    Column("started_at", _UTC, nullable=False),
    Column("completed_at", _UTC, comment="null while running"),
    Column("steps", JSONB, nullable=False, server_default="[]", comment="the message's steps, in order"),
    UniqueConstraint("tenant_id", "run_id", info={"purpose": "a run has one trace; also finds the trace of a run"}),
    CheckConstraint("status IN ('running','completed','failed','aborted')", name="status"),
    comment="One execution trace a run that was traced; a complete trace is never changed",
)
