"""The BRIN indexes are summarized as their tables grow, not only when a table is vacuumed.

Revision: 0003, after 0002. It changes two settings in the catalog and reads or rewrites nothing. Each index is
locked for milliseconds, and writers of its table wait; it affects no version of the worker.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Until it is summarized, a range of pages is read by every search by time: with the defaults of autovacuum, all that
# has come since a fifth of the table was new.
INDEXES = ("run_completions_received_at", "rollbacks_occurred_at")


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    for index in INDEXES:
        op.execute(f"ALTER INDEX governance.{index} SET (autosummarize = on)")


def downgrade() -> None:
    """Undo the expansion."""
    for index in INDEXES:
        op.execute(f"ALTER INDEX governance.{index} RESET (autosummarize)")
