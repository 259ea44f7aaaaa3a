"""No migration may block a running worker or break one of the previous version; squawk checks all of them."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import Script, ScriptDirectory

from domains.migrations.upgrade import config

SQUAWK = str(Path(sys.executable).with_name("squawk"))
OLDEST_POSTGRESQL = "15"
# As closeout migrate starts: a second for a lock, no limit for a statement.
AS_MIGRATE_BEGINS = "SET lock_timeout = '1s';\n"
NOT_ASKED = (
    "require-statement-timeout",
    "prefer-bigint-over-smallint",
    "prefer-bigint-over-int",
    "ban-uncommitted-transaction",  # an autocommit block is written as COMMIT and BEGIN
    "transaction-nesting",
)
# Objects that a running older worker may rely on. A migration that removes it states
# `step = "contract"`, and ships one version after the last worker that uses it.
TAKES_AWAY = {"ban-drop-column", "ban-drop-table", "ban-drop-constraint", "ban-drop-not-null"}
# Accepted by squawk: the complete table is rewritten or locked for the duration.
WHOLE_TABLE = re.compile(
    r"^\s*(UPDATE|DELETE|TRUNCATE|LOCK|CLUSTER|VACUUM|ALTER TABLE .* SET (LOGGED|UNLOGGED|TABLESPACE|ACCESS METHOD))\b",
    re.IGNORECASE | re.MULTILINE,
)
# Found, and harmless, with the reason.
ACCEPTED = {
    "0002": {"constraint-missing-not-valid"},  # policies holds some hundred rows
    "0009": {"ban-drop-constraint"},  # its own, where an earlier attempt was interrupted
}


def migrations() -> list[Script]:
    return list(ScriptDirectory.from_config(config()).walk_revisions())[::-1]


def sql_of(migration: Script) -> str:
    """Return the statements of a migration's upgrade, without running them."""
    written = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": written, "transaction_per_migration": True}
    )
    with Operations.context(context):
        migration.module.upgrade()
    return written.getvalue()


def faults(sql: str, *, contract: bool = False) -> set[str]:
    """Return the names of the rules that *sql* breaks."""
    options = ["--pg-version", OLDEST_POSTGRESQL, "--reporter", "json", "--assume-in-transaction"]
    done = subprocess.run(
        [SQUAWK, *options, "--exclude", ",".join(NOT_ASKED)],
        input=AS_MIGRATE_BEGINS + sql,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {fault["rule_name"] for fault in json.loads(done.stdout)}
    if WHOLE_TABLE.search(sql):
        found.add("whole-table")
    return found - TAKES_AWAY if contract else found


@pytest.mark.parametrize("migration", migrations(), ids=lambda migration: migration.revision)
def test_no_migration_blocks_workers_or_breaks_those_of_the_previous_version(migration: Script):
    contract = getattr(migration.module, "step", "expand") == "contract"
    assert faults(sql_of(migration), contract=contract) == ACCEPTED.get(migration.revision, set())


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("CREATE INDEX i ON {0} (status)", "require-concurrent-index-creation"),
        ("CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON {0} (status)", "ban-concurrent-index-creation-in-transaction"),
        ("DROP INDEX governance.rollbacks_by_run", "require-concurrent-index-deletion"),
        ("REINDEX TABLE {0}", "require-concurrent-reindex"),
        ("ALTER TABLE {0} ADD COLUMN seen_at timestamptz DEFAULT clock_timestamp()", "adding-field-with-default"),
        ("ALTER TABLE {0} ADD COLUMN n bigint GENERATED ALWAYS AS IDENTITY", "adding-field-with-default"),
        ("ALTER TABLE {0} ADD COLUMN n text NOT NULL", "adding-required-field"),
        ("ALTER TABLE {0} ALTER COLUMN title TYPE varchar(100)", "changing-column-type"),
        ("ALTER TABLE {0} ALTER COLUMN agent_id SET NOT NULL", "adding-not-nullable-field"),
        ("ALTER TABLE {0} ADD CONSTRAINT c CHECK (title <> '')", "constraint-missing-not-valid"),
        ("ALTER TABLE {0} ADD CONSTRAINT c UNIQUE (tenant_id, incident_id)", "disallowed-unique-constraint"),
        (
            "ALTER TABLE {0} ADD CONSTRAINT c CHECK (title <> '') NOT VALID; ALTER TABLE {0} VALIDATE CONSTRAINT c",
            "constraint-missing-not-valid",
        ),
        ("ALTER TABLE {0} DROP COLUMN title", "ban-drop-column"),
        ("ALTER TABLE {0} DROP CONSTRAINT incidents_status_check", "ban-drop-constraint"),
        ("ALTER TABLE {0} RENAME COLUMN title TO headline", "renaming-column"),
        ("ALTER TABLE {0} RENAME TO happenings", "renaming-table"),
        ("DROP TABLE {0}", "ban-drop-table"),
        ("UPDATE {0} SET agent_id = ''", "whole-table"),
        ("ALTER TABLE {0} SET UNLOGGED", "whole-table"),
    ],
)
def test_a_statement_that_blocks_or_breaks_workers_is_detected(statement: str, rule: str):
    assert rule in faults(statement.format("governance.incidents") + ";")


def test_contract_step_may_drop_but_not_rename():
    assert faults("ALTER TABLE governance.incidents DROP COLUMN title;", contract=True) == set()
    assert faults("ALTER TABLE governance.incidents RENAME COLUMN title TO headline;", contract=True) != set()


@pytest.mark.parametrize(
    "statements",
    [
        "ALTER TABLE governance.incidents ADD COLUMN note text",
        "ALTER TABLE governance.incidents ADD COLUMN seen boolean NOT NULL DEFAULT false",
        "ALTER TABLE governance.incidents ADD CONSTRAINT c CHECK (title <> '') NOT VALID",
        "ALTER TABLE governance.incidents VALIDATE CONSTRAINT c",
        "COMMIT; CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON governance.incidents (status); BEGIN",
    ],
)
def test_a_statement_without_effect_on_workers_is_accepted(statements: str):
    assert faults(statements + ";") == set()
