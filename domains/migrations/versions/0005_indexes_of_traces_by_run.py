"""The indexes for a key of ``traces`` by run: a unique one by run, and one by trace id.

Revision: 0005, after 0004. Both are built while workers write. An attempt that is interrupted leaves an invalid index,
which the next one drops first. No version of the worker sees a difference.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_DROP = "DROP INDEX CONCURRENTLY IF EXISTS governance."


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    with op.get_context().autocommit_block():
        op.execute(f"{_DROP}traces_by_run")
        op.execute(
            "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS traces_by_run ON governance.traces (tenant_id, run_id)"
        )
        op.execute(f"{_DROP}traces_by_trace_id")
        op.execute(
            "CREATE INDEX CONCURRENTLY IF NOT EXISTS traces_by_trace_id ON governance.traces (tenant_id, trace_id)"
        )
        op.execute("COMMENT ON INDEX governance.traces_by_trace_id IS 'Finds the runs of a trace'")


def downgrade() -> None:
    """Undo the expansion."""
    with op.get_context().autocommit_block():
        op.execute(f"{_DROP}traces_by_trace_id")
        op.execute(f"{_DROP}traces_by_run")
