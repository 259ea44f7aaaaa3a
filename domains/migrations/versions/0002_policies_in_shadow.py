"""Policies in shadow: evaluated over every run and counted, deciding nothing.

Revision: 0002, after 0001. Two columns without a default, so that no row is rewritten: each table is locked for the
milliseconds of a catalog change. A version in shadow is never enabled, so a worker of 0001 does not see it.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    # In the order in which a close-out uses the tables, so that it and this cannot wait for each other.
    op.add_column(
        "policies",
        sa.Column(
            "shadow",
            sa.Text(),
            nullable=True,
            comment="running or ended: a version that is only counted, never enabled; null: the others",
        ),
        schema="governance",
    )
    op.create_check_constraint(
        op.f("policies_shadow_check"),
        "policies",
        "shadow IS NULL OR (shadow IN ('running','ended') AND NOT enabled)",
        schema="governance",
    )
    op.add_column(
        "policy_evaluations",
        sa.Column(
            "shadow",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="what policies in shadow would have done, or their errors; null: nothing",
        ),
        schema="governance",
    )


def downgrade() -> None:
    """Undo the expansion."""
    op.drop_column("policy_evaluations", "shadow", schema="governance")
    op.drop_constraint(op.f("policies_shadow_check"), "policies", schema="governance")
    op.drop_column("policies", "shadow", schema="governance")
