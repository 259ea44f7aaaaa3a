"""Checks of the database with this role: whether a worker can close out runs, and what is unfinished."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from consumer.diagnosis.check import Check, ok, problem, unreachable, warning
from consumer.diagnosis.citus import cluster_checks
from consumer.errors import one_line
from consumer.outbox.backlog import BacklogState, describe_backlog, describe_set_aside, read_backlog
from consumer.postgres.engine import DATABASE_ERRORS, WORKER_SETTINGS
from consumer.postgres.privileges import REMEDY, format_privileges, missing_privileges
from consumer.wording import counted, format_seconds
from domains.database.pooling import is_pooled
from domains.migrations.upgrade import differences, known, newest

# 15: unique constraints that count nulls as equal (policies).
OLDEST_VERSION = 15
# Maximum difference between the two clocks, in seconds. A second affects the measured lag, a minute affects listing and
# pruning.
_CLOCK_WARNING, _CLOCK_PROBLEM = 1.0, 60.0
# Seconds after which an unfinished legacy close-out does not finish without a redelivery.
_UNFINISHED_SECONDS = 300

_ABOUT = text(
    """
    SELECT current_setting('server_version_num')::int AS version_num, current_setting('server_version') AS version,
           pg_is_in_recovery() AS in_recovery, current_setting('transaction_read_only') = 'on' AS read_only,
           clock_timestamp() AS now, current_user AS role, r.rolsuper AS superuser,
           current_setting('max_connections')::int
               - CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
                      + coalesce(current_setting('reserved_connections', true), '0')::int END AS server_limit,
           nullif(r.rolconnlimit, -1) AS role_limit, nullif(d.datconnlimit, -1) AS database_limit,
           s.everybody, s.of_role, s.of_database
      FROM pg_roles r, pg_database d,
           (SELECT count(*) AS everybody, count(*) FILTER (WHERE usename = current_user) AS of_role,
                   count(*) FILTER (WHERE datname = current_database()) AS of_database
              FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()) s
     WHERE r.rolname = current_user AND d.datname = current_database()
    """
)
_IN_SESSION = text("SELECT name, current_setting(name) AS value FROM unnest(CAST(:names AS text[])) AS name")
_USAGE = text("SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = 'governance'")
_VERSION = text("SELECT version_num FROM governance.schema_version")
_UNFINISHED = text(
    "SELECT count(*) AS runs, min(received_at) AS oldest FROM governance.run_completions "
    "WHERE committed_at IS NULL AND received_at < now() - make_interval(secs => :seconds)"
)


async def examine_database(
    engine: AsyncEngine, *, connections_needed: int, clock: Callable[[], datetime]
) -> list[Check]:
    """Return the checks of the database as a worker with the same URL sees it; never raises for database errors."""
    try:
        async with engine.connect() as opened:
            conn = await opened.execution_options(isolation_level="AUTOCOMMIT")
            await conn.execute(text("SELECT 1"))
            before = clock()
            about = (await conn.execute(_ABOUT)).one()
            checks = [version_check(about.version_num, about.version), _writable(about), _role(about)]
            checks += [_clock(about.now, before, clock()), _connections(about, connections_needed)]
            checks += [await _durability(conn), *await _pooler(conn)]
            schema, applied = await _schema(conn)
            if applied:
                schema += await _rights(conn)
        if schema and schema[0].state == "ok":
            schema[:1] = [await _tables(engine, schema[0])]
        if applied:
            async with engine.connect() as opened:
                conn = await opened.execution_options(isolation_level="AUTOCOMMIT")
                schema += [await _readable("outbox", _outbox, conn), await _readable("unfinished", _unfinished, conn)]
                schema += await cluster_checks(conn)
    except DATABASE_ERRORS as error:
        return [await unreachable("postgresql", error, "DATABASE_URL")]
    return [*checks, *schema]


def version_check(number: int, name: str) -> Check:
    """Check the server's version."""
    if number >= OLDEST_VERSION * 10_000:
        return ok("postgresql", f"reachable, version {name}")
    return problem("postgresql", f"version {name}; the schema needs {OLDEST_VERSION} or newer", "upgrade the server")


def _writable(about: Row[Any]) -> Check:
    if about.in_recovery:
        message = "this server is a read-only standby"
        return problem("writable", message, "use the primary, or all hosts with target_session_attrs=read-write")
    if about.read_only:
        message = "transactions are read-only here (default_transaction_read_only)"
        return problem(
            "writable", message, "reset it for the server, the database or the role; until then a worker waits"
        )
    return ok("writable", "primary, writable")


def _role(about: Row[Any]) -> Check:
    if about.superuser:
        message = f"{about.role} is a superuser: privileges and connection limits are not enforced"
        return warning("role", message, "run workers with a role that can only read and write the tables")
    return ok("role", f"{about.role}, not a superuser")


def _clock(theirs: datetime, before: datetime, after: datetime) -> Check:
    # Half of the round trip is the error of the comparison.
    off = abs(theirs - (before + (after - before) / 2)) - (after - before) / 2
    seconds = max(off, timedelta(0)).total_seconds()
    message = f"{seconds:.1f} s between this machine and the server"
    remedy = "synchronize both with NTP: a worker's clock is used to measure lag and to list and prune runs"
    if seconds > _CLOCK_PROBLEM:
        return problem("clock", message, remedy)
    return warning("clock", message, remedy) if seconds > _CLOCK_WARNING else ok("clock", message)


def _connections(about: Row[Any], needed: int) -> Check:
    limits = [(about.server_limit, about.everybody, "max_connections")]
    limits += [(about.role_limit, about.of_role, f"the limit of role {about.role}")] if about.role_limit else []
    limits += [(about.database_limit, about.of_database, "the database's limit")] if about.database_limit else []
    left, name, limit = min((limit - used, name, limit) for limit, used, name in limits)
    message = f"{max(left, 0)} of {limit} left ({name}); a worker takes up to {needed}"
    if left < needed:
        return warning(
            "connections",
            message,
            "this is enough only if all workers are already running; raise the limit, or run fewer workers",
        )
    return ok("connections", message)


# reset_val is the session's default: of the server, the database or the role.
_DURABILITY = text(
    """
    SELECT (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit') AS synchronous_commit,
           current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
           count(pid) AS standbys, count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')) AS awaited,
           count(sync_state) AS seen
      FROM pg_stat_replication
    """
)


async def _durability(conn: AsyncConnection) -> Check:
    """Check for settings under which a crash or a failover can lose committed runs."""
    found = (await conn.execute(_DURABILITY)).one()
    if off := [name for name in ("fsync", "full_page_writes") if getattr(found, name) == "off"]:
        message = f"{' and '.join(off)} off: a crash of the server can lose or damage committed runs"
        return problem("durability", message, "set it to on, in postgresql.conf")
    if found.synchronous_commit == "off":
        message = "synchronous_commit is off for the server, the database or the role; workers raise it to local"
        return warning("durability", message, "reset it; behind a pooler workers cannot raise it")
    waits = found.synchronous_commit != "local" and found.awaited
    if found.standbys and found.seen and not waits:
        standbys = counted(found.standbys, "standby is", "standbys are")
        message = f"{standbys} connected, and no commit waits for a standby: a failover can lose acknowledged runs"
        return warning("durability", message, "set synchronous_standby_names, and synchronous_commit to on")
    waited = ", and for a standby" if waits else ""
    return ok("durability", f"a commit waits for the disk{waited} (synchronous_commit = {found.synchronous_commit})")


async def _pooler(conn: AsyncConnection) -> list[Check]:
    """Check a pooler in front of the server; returns nothing if there is none."""
    if not await is_pooled(conn):
        return []
    found = {row.name: row.value for row in await conn.execute(_IN_SESSION, {"names": list(WORKER_SETTINGS)})}
    missing = [f"{name}={value}" for name, value in WORKER_SETTINGS.items() if found[name] not in {value, "closeout"}]
    if not missing:
        return [ok("pooler", "PgBouncer detected; required session settings are present")]
    message = f"PgBouncer detected; this role's sessions lack {', '.join(missing)}"
    return [warning("pooler", message, "run deploy/pgbouncer/worker-role.sql as this role on the server itself")]


async def _schema(conn: AsyncConnection) -> tuple[list[Check], bool]:
    """Check the schema's version; return also whether its tables can be checked."""
    usage = (await conn.execute(_USAGE)).scalar_one_or_none()
    if usage is None:
        return [problem("schema", "schema governance does not exist", "run closeout migrate")], False
    if not usage:
        return [
            problem(
                "schema",
                "this role has no USAGE on schema governance",
                "run deploy/postgresql/rights.sql: it grants USAGE",
            )
        ], False
    try:
        current = (await conn.execute(_VERSION)).scalar_one_or_none()
    except DATABASE_ERRORS as error:
        message = f"version cannot be read: {one_line(error)}"
        return [warning("schema", message, "run closeout migrate, or grant SELECT on governance.schema_version")], True
    if current == newest():
        return [ok("schema", f"at {current}, as this version of closeout requires")], True
    if current in known():
        return [
            problem("schema", f"at {current}; this version of closeout requires {newest()}", "run closeout migrate")
        ], True
    message = f"at {current}, unknown to this version of closeout ({newest()}): a newer version migrated it"
    return [warning("schema", message, "upgrade closeout")], True


async def _tables(engine: AsyncEngine, version: Check) -> Check:
    found = await differences(engine)
    if not found:
        return version
    message = f"{version.found.partition(',')[0]}, with {counted(len(found), 'difference')}; the first: {found[0]}"
    return problem("schema", message, "closeout migrate --check lists all; fix them as the tables' owner")


async def _rights(conn: AsyncConnection) -> list[Check]:
    missing = await missing_privileges(conn)
    if not missing:
        return [ok("rights", "this role has all privileges that a worker needs")]
    return [
        problem("rights", f"missing privileges: {format_privileges(missing)}", f"{REMEDY}; until then a worker waits")
    ]


async def _readable(name: str, check: Callable[[AsyncConnection], Awaitable[Check]], conn: AsyncConnection) -> Check:
    try:
        return await check(conn)
    except DATABASE_ERRORS as error:
        return problem(name, f"cannot be checked: {one_line(error)}", "see the checks schema and rights above")


async def _outbox(conn: AsyncConnection) -> Check:
    found = await read_backlog(conn)
    if found.set_aside:
        runs = counted(sum(found.set_aside.values()), "run is", "runs are")
        return problem("outbox", f"events of {runs} set aside: {next(iter(found.set_aside))}", describe_set_aside())
    meaning, remedy = describe_backlog(found.state())
    if not found.all.events:
        return ok("outbox", f"empty: {meaning}")
    runs = counted(found.all.runs, "run has", "runs have")
    message = f"{runs} unpublished events, the oldest for {format_seconds(found.all.oldest_seconds)}; {meaning}"
    if found.state() is BacklogState.STALE:
        return problem("outbox", message, "start a worker, or publish the events now with closeout outbox drain")
    return warning("outbox", message, remedy) if remedy else ok("outbox", message)


async def _unfinished(conn: AsyncConnection) -> Check:
    found = (await conn.execute(_UNFINISHED, {"seconds": _UNFINISHED_SECONDS})).one()
    if not found.runs:
        return ok("unfinished", "no legacy close-out is unfinished")
    count = counted(found.runs, "legacy close-out is", "legacy close-outs are")
    message = f"{count} unfinished, the first since {found.oldest:%Y-%m-%d %H:%M}Z"
    return problem("unfinished", message, "run closeout reconcile for the runs and what to do")
