"""The comment on ``run_completions.phase`` describes the column instead of pointing to a document.

Revision: 0004, after 0003. One comment in the catalog: nothing is read or rewritten, and no worker sees a difference.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    op.execute("COMMENT ON COLUMN governance.run_completions.phase IS 'the last phase that is completed'")


def downgrade() -> None:
    """Keep the comment: no version needs the previous one."""
