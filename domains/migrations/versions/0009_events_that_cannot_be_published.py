"""Events that RabbitMQ refuses or that no message can hold are set aside, and new rows must fit into a message.

Revision: 0009, after 0008. The table is locked for the milliseconds of a catalog change; existing rows are checked
while workers write. If one fails the check, correct or delete it, and run closeout migrate again. Earlier workers leave
both columns null.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

COLUMNS = (
    (
        "set_aside_until",
        "timestamptz",
        "on a run's last event: it could not be published, and is tried again then; null: not set aside",
    ),
    ("set_aside_reason", "text", "why it could not be published"),
)
PUBLISHABLE = (
    "octet_length(routing_key) <= 255 AND octet_length(type) <= 255"
    " AND octet_length(body) <= 16777216 AND left(body, 1) = '{'"
)
PURPOSE = "Counts the runs whose events are set aside; empty when all is well"


def upgrade() -> None:
    """Expand: nothing here may break the version of the worker that is still running."""
    for name, kind, comment in COLUMNS:
        op.execute(f"ALTER TABLE governance.outbox_events ADD COLUMN IF NOT EXISTS {name} {kind}")
        op.execute(f"COMMENT ON COLUMN governance.outbox_events.{name} IS '{comment.replace(chr(39), chr(39) * 2)}'")
    op.execute("ALTER TABLE governance.outbox_events DROP CONSTRAINT IF EXISTS publishable")
    op.execute(f"ALTER TABLE governance.outbox_events ADD CONSTRAINT publishable CHECK ({PUBLISHABLE}) NOT VALID")
    with op.get_context().autocommit_block():
        op.execute("ALTER TABLE governance.outbox_events VALIDATE CONSTRAINT publishable")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS governance.outbox_events_set_aside")
        op.execute(
            "CREATE INDEX CONCURRENTLY IF NOT EXISTS outbox_events_set_aside ON governance.outbox_events"
            " (set_aside_until) WHERE set_aside_until IS NOT NULL"
        )
        op.execute(f"COMMENT ON INDEX governance.outbox_events_set_aside IS '{PURPOSE}'")


def downgrade() -> None:
    """Undo the expansion."""
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS governance.outbox_events_set_aside")
    op.execute("ALTER TABLE governance.outbox_events DROP CONSTRAINT publishable")
    for name, _, _ in reversed(COLUMNS):
        op.drop_column("outbox_events", name, schema="governance")
