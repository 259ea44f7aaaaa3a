"""Indexes that find the runs of a parent or a session; other runs are not in them, and cost nothing.

Revision: 0008, after 0007. Both are built while workers write. An attempt that is interrupted leaves an invalid index,
which the next one drops first.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

COLUMNS = ("parent_run_id", "session_id")
PURPOSE = "Finds the runs of a parent or a session; holds nothing else, so it costs others nothing"


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    with op.get_context().autocommit_block():
        for column in COLUMNS:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS governance.run_completions_{column}")
            op.execute(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS run_completions_{column} ON governance.run_completions"
                f" (tenant_id, {column}) WHERE {column} IS NOT NULL"
            )
            op.execute(f"COMMENT ON INDEX governance.run_completions_{column} IS '{PURPOSE}'")


def downgrade() -> None:
    """Undo the expansion."""
    with op.get_context().autocommit_block():
        for column in COLUMNS:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS governance.run_completions_{column}")
