"""The table of traces."""

from sqlalchemy import CheckConstraint, Column, DateTime, Index, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from domains.database.schema import metadata

_UTC = DateTime(timezone=True)

traces = Table(
    "traces",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("trace_id", Uuid, nullable=False, comment="several runs may share one"),
    Column("agent_id", Text),
    Column("status", Text, nullable=False, comment="running until the run's completion is known"),
    Column("started_at", _UTC, nullable=False),
    Column("completed_at", _UTC, comment="null while running"),
    Column("steps", JSONB, nullable=False, server_default="[]", comment="the message's steps, in order"),
    CheckConstraint("status IN ('running','completed','failed','aborted')", name="status"),
    comment="One execution trace a run that was traced; a complete trace is never changed",
)

Index("traces_by_trace_id", traces.c.tenant_id, traces.c.trace_id, info={"purpose": "Finds the runs of a trace"})
