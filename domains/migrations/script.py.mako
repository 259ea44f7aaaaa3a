"""${message}.

Revision: ${up_revision}, after ${down_revision}.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Undo the expansion."""
    ${downgrades if downgrades else "pass"}
