"""The database's roles of ``deploy/postgresql``: each has exactly its privileges."""

from collections.abc import Iterator

import psycopg
import pytest
from servers import PostgresServer
from typer.testing import CliRunner

from consumer.cli import app
from consumer.postgres.privileges import WORKER_PRIVILEGES, each_privilege
from domains.tables import metadata
from tests.support.roles import DEPLOY, OPERATOR, OWNER, READER, WORKER, WORKER_USER, as_user, make_roles

TABLES = [*sorted(table.name for table in metadata.tables.values()), "schema_version"]
PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN")
BY_COLUMN = ("INSERT", "UPDATE", "REFERENCES")
# A worker also reads the schema's version, for closeout doctor.
OF_WORKER = {**WORKER_PRIVILEGES, "schema_version": "SELECT"}
ALL_READ = dict.fromkeys(TABLES, "SELECT")
OF_OPERATOR = ALL_READ | {
    "policies": "SELECT INSERT UPDATE(enabled,shadow)",
    "outbox_events": "SELECT UPDATE(created_at,set_aside_until,set_aside_reason) DELETE",
    "run_completions": "SELECT UPDATE(phase,events_published_at) DELETE",
    "incidents": "SELECT UPDATE(title) DELETE",
    "prevention_records": "SELECT DELETE",
    "policy_evaluations": "SELECT DELETE",
    "traces": "SELECT DELETE",
    "rollbacks": "SELECT DELETE",
}
# Reserved to the owner or an administrator.
REFUSED = {
    "drop a table": "DROP TABLE governance.incidents",
    "empty a table": "TRUNCATE governance.outbox_events",
    "create a table": "CREATE TABLE governance.mine (x int)",
    "create a table elsewhere": "CREATE TABLE public.mine (x int)",
    "create a temporary table": "CREATE TEMP TABLE mine (x int)",
    "create a schema": "CREATE SCHEMA mine",
    "create a view": "CREATE VIEW governance.mine AS SELECT 1",
    "create a function": "CREATE FUNCTION governance.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "create an extension": "CREATE EXTENSION pg_trgm",
    "alter a table": "ALTER TABLE governance.incidents ADD COLUMN mine int",
    "add an index": "CREATE INDEX ON governance.incidents (title)",
    "add a trigger": "CREATE TRIGGER t BEFORE INSERT ON governance.traces EXECUTE FUNCTION tsvector_update_trigger()",
    "lock a table exclusively": "LOCK TABLE governance.policies IN ACCESS EXCLUSIVE MODE",
    "rewrite a run": "UPDATE governance.run_completions SET status = 'succeeded'",
    "rewrite an incident": "UPDATE governance.incidents SET severity = 'LOW'",
    "rewrite an event": "UPDATE governance.outbox_events SET body = '{}'",
    "write the schema's version": "UPDATE governance.schema_version SET version_num = '9999'",
    "run a program": "COPY governance.incidents TO PROGRAM 'cat'",
    "read a program": "COPY governance.rollbacks FROM PROGRAM 'echo'",
    "write a file": "COPY governance.incidents TO '/tmp/incidents'",
    "read a file": "SELECT pg_read_file('PG_VERSION')",
    "read passwords": "SELECT rolpassword FROM pg_authid",
    "create a large object": "SELECT lo_create(0)",
    "become the owner": "SET ROLE closeout_owner",
    "become the superuser": "SET SESSION AUTHORIZATION postgres",
    "create a role": "CREATE ROLE mine",
    "make itself a superuser": "ALTER ROLE CURRENT_USER SUPERUSER",
    "create a database": "CREATE DATABASE mine",
    "change the server": "ALTER SYSTEM SET work_mem = '1GB'",
    "bypass triggers and foreign keys": "SET session_replication_role = replica",
    "end another session": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
}  # fmt: skip
# Only for the worker; the operator prunes and applies policies.
REFUSED_TO_THE_WORKER = {
    "write policies": "INSERT INTO governance.policies SELECT * FROM governance.policies",
    "switch policies": "UPDATE governance.policies SET enabled = false",
    **{f"delete from {table}": f"DELETE FROM governance.{table}" for table in TABLES if table != "outbox_events"},
}


@pytest.fixture(scope="module")
def place(postgres: PostgresServer) -> Iterator[str]:
    """A migrated database on which roles.sql was run: its database-level grants are not part of a template."""
    name = "roles"
    postgres.create_database(name, template="migrated")
    make_roles(postgres, name)
    yield name
    postgres.drop_database(name)


def held(postgres: PostgresServer, database: str, role: str) -> dict[str, set[str]]:
    """Return every privilege that *role* has on each table, and on single columns of it."""
    privileges = ", ".join(f"('{name}')" for name in PRIVILEGES)
    of_columns = ", ".join(f"('{name}')" for name in BY_COLUMN)
    rows = postgres.psql(
        f"""
        WITH t AS (SELECT oid, relname FROM pg_class
                    WHERE relnamespace = 'governance'::regnamespace AND relkind = 'r')
        SELECT relname, p FROM t, (VALUES {privileges}) AS v (p) WHERE has_table_privilege('{role}', t.oid, p)
        UNION ALL
        SELECT relname, p || '(' || attname || ')'
          FROM t JOIN pg_attribute a ON a.attrelid = t.oid AND attnum > 0 AND NOT attisdropped,
               (VALUES {of_columns}) AS v (p)
         WHERE has_column_privilege('{role}', t.oid, attnum, p) AND NOT has_table_privilege('{role}', t.oid, p)
        """,
        database,
    )
    found: dict[str, set[str]] = {}
    for row in rows.splitlines():
        table, privilege = row.split("\t")
        found.setdefault(table, set()).add(privilege)
    return found


def listed(rights: dict[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for right in each_privilege(rights):
        found.setdefault(right.table, set()).add(str(right))
    return found


@pytest.mark.parametrize(
    ("role", "rights"), [(WORKER, OF_WORKER), (OPERATOR, OF_OPERATOR), (READER, ALL_READ)], ids=lambda v: str(v)[:17]
)
def test_each_role_has_exactly_its_privileges_on_every_table_and_column(postgres, place, role, rights):
    assert held(postgres, place, role) == listed(dict(rights))


@pytest.mark.parametrize("role", [WORKER, OPERATOR, READER])
def test_operations_granted_to_no_role_are_refused(postgres, place, role):
    assert not_refused(postgres, place, role, REFUSED) == []


@pytest.mark.parametrize("role", [WORKER, READER])
def test_operators_change_policies_and_history_and_workers_cannot(postgres, place, role):
    assert not_refused(postgres, place, role, REFUSED_TO_THE_WORKER) == []


def test_the_owner_can_migrate_and_only_within_its_schema(postgres, place):
    of_the_owner = {what: sql for what, sql in REFUSED.items() if "governance." not in sql or "COPY" in sql}

    assert not_refused(postgres, place, OWNER, of_the_owner) == ["become the owner"]


def test_a_reader_cannot_grant_its_privileges(postgres, place):
    before = held(postgres, place, "public")
    postgres.psql("GRANT SELECT ON ALL TABLES IN SCHEMA governance TO PUBLIC", place, user=OPERATOR)

    assert held(postgres, place, "public") == before == {}


def not_refused(postgres: PostgresServer, database: str, role: str, statements: dict[str, str]) -> list[str]:
    """Return the statements that *role* may execute, each tried in a transaction that is rolled back."""
    return [what for what, sql in statements.items() if not refused(postgres, database, role, sql)]


def refused(postgres: PostgresServer, database: str, role: str, statement: str) -> bool:
    alone = statement.startswith(("CREATE DATABASE", "ALTER SYSTEM"))
    try:
        postgres.psql(statement if alone else f"BEGIN; {statement}; ROLLBACK", database, user=role)
    except psycopg.Error as error:
        # Any other error does not prove that the privilege is missing.
        return isinstance(error, psycopg.errors.InsufficientPrivilege)
    return False


def test_a_command_without_privileges_reports_what_was_refused(postgres, place, bare_amqp_url, tmp_path, monkeypatch):
    file = tmp_path / "policies.yaml"
    file.write_text("- {name: n, effect: flag, severity: LOW, condition: 'true'}\n")
    monkeypatch.setenv("DATABASE_URL", postgres.url(place, user=WORKER))
    monkeypatch.setenv("AMQP_URL", as_user(bare_amqp_url, WORKER_USER))
    refused = {("policies", "apply", str(file)): "table policies", ("topology",): "exchange 'runs'"}
    for words, named in refused.items():
        result = CliRunner().invoke(app, list(words))

        assert result.exit_code == 1
        assert named in result.output
        assert (
            "refused for user 'closeout-worker'" in result.output or "deploy/README.md lists the role" in result.output
        )


def test_the_reader_role_is_enough_for_every_read_only_command(postgres, place, tmp_path, monkeypatch):
    file = tmp_path / "policies.yaml"
    file.write_text("- {name: n, effect: flag, severity: LOW, condition: 'true'}\n")
    monkeypatch.setenv("DATABASE_URL", postgres.url(place, user=READER))
    looks = ["runs list", "policies list", "policies shadow", "outbox status", "reconcile", "migrate --check"]
    for words in [*looks, f"policies backtest {file} --since 1d"]:
        result = CliRunner().invoke(app, words.split())

        assert result.exit_code == 0, f"{words}: {result.output}"


def test_a_database_owner_with_createrole_can_create_the_roles(postgres):
    """As on a managed PostgreSQL; with other role names, because those of the tests exist."""
    made = (DEPLOY / "postgresql/roles.sql").read_text().replace("closeout_", "managed_")
    postgres.psql("CREATE ROLE customer LOGIN CREATEROLE")
    postgres.psql("CREATE DATABASE managed OWNER customer")
    try:
        for _ in range(2):
            postgres.psql(f"BEGIN; {made}; COMMIT", "managed", user="customer")
        postgres.psql("CREATE TABLE governance.mine (x int)", "managed", user="managed_owner")
        assert refused(postgres, "managed", "managed_worker", "CREATE TABLE governance.its (x int)")
    finally:
        postgres.drop_database("managed")
        postgres.psql("DROP ROLE IF EXISTS managed_owner, managed_worker, managed_operator, managed_reader, customer")
