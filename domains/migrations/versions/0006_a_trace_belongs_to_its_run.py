"""The key of ``traces`` is the run: several runs may share a trace id, and each keeps its steps.

Revision: 0006, after 0005. The index of 0005 becomes the primary key; the old key and the constraint that the new key
repeats are dropped. All of it is a change of the catalog: the table is locked for milliseconds. The workers of earlier
versions name no constraint in their statements, so they continue; only a worker of a later version stores the
steps of every run of a shared trace.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
step = "contract"


def upgrade() -> None:
    """Replace the key."""
    op.execute(
        "ALTER TABLE governance.traces"
        " DROP CONSTRAINT traces_pkey,"
        " DROP CONSTRAINT traces_tenant_id_run_id_key,"
        " ADD CONSTRAINT traces_pkey PRIMARY KEY USING INDEX traces_by_run"
    )
    op.execute("COMMENT ON COLUMN governance.traces.trace_id IS 'several runs may share one'")


def downgrade() -> None:
    """Restore the previous key; fails if two runs share a trace. The table is locked while the indexes are built."""
    op.execute("COMMENT ON COLUMN governance.traces.trace_id IS NULL")
    op.execute(
        "ALTER TABLE governance.traces"
        " DROP CONSTRAINT traces_pkey,"
        " ADD CONSTRAINT traces_pkey PRIMARY KEY (tenant_id, trace_id),"
        " ADD CONSTRAINT traces_tenant_id_run_id_key UNIQUE (tenant_id, run_id)"
    )
