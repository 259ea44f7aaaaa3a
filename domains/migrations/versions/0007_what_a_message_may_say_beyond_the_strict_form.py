"""Columns of ``run_completions``: the runner's own id, cached tokens, steps, parent, session, and the adjustments.

Revision: 0007, after 0006. Columns without a default, so that no row is rewritten: the table is locked for the
milliseconds of a catalog change. Workers of earlier versions leave them null.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

ADJUSTMENTS = "what was changed, cut or dropped of the message: a list of field, found, stored; null: nothing"
COLUMNS = (
    ("run_ref", sa.Text(), "the runner's id of the run where it is not a UUID; run_id is derived"),
    ("cached_input_tokens", sa.BigInteger(), None),
    ("step_count", sa.Integer(), "steps of the message; null: without a trace, or stored before 0007"),
    ("parent_run_id", sa.Text(), "the run that started this one: its run_ref, or its run_id"),
    ("session_id", sa.Text(), "the conversation that the run belongs to"),
    ("adjustments", postgresql.JSONB(astext_type=sa.Text()), ADJUSTMENTS),
)


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    for name, kind, comment in COLUMNS:
        op.add_column("run_completions", sa.Column(name, kind, comment=comment), schema="governance")


def downgrade() -> None:
    """Undo the expansion."""
    for name, _, _ in reversed(COLUMNS):
        op.drop_column("run_completions", name, schema="governance")
