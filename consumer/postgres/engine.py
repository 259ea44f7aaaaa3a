"""The engine: SQLAlchemy over asyncpg, with every wait bounded."""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from config.settings import SettingsError
from config.urls import CHECKING_MODES, SYSTEM_ROOTS, in_connect_order, parameters
from consumer.errors import one_line
from consumer.tls_errors import Server, explain
from domains.database.pooling import STATEMENT_PREFIX

# Seconds to connect to one host. A host that is down refuses at once; an unreachable one does not respond.
CONNECT_TIMEOUT_SECONDS = 5.0
# Seconds for one statement, enforced by the server and then by the client, which detects a stalled connection.
STATEMENT_TIMEOUT_SECONDS = 15.0
COMMAND_TIMEOUT_SECONDS = 20.0
# Seconds to wait for a lock: another worker's commit takes milliseconds.
LOCK_TIMEOUT_SECONDS = 5.0
# Seconds after which the server ends the transaction of a stopped worker and releases its locks.
IDLE_TRANSACTION_SECONDS = 30.0
# Seconds to wait for a pooled connection.
POOL_TIMEOUT_SECONDS = 10.0

_SERVER_SETTINGS = {
    "application_name": "closeout",
    "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS:.0f}s",
    "lock_timeout": f"{LOCK_TIMEOUT_SECONDS:.0f}s",
    "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_SECONDS:.0f}s",
    # One plan suits any number of rows, and planning costs more than executing these statements.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}

# An acknowledged run must survive a crash of the server, whatever its, the database's or the role's default is. Values
# that wait for more are kept.
_DURABLE = """
    SELECT set_config('synchronous_commit', 'local', false) WHERE current_setting('synchronous_commit') = 'off'
"""
# Citus plans with the parameters' values: they say on which node the rows are. It refuses most generic plans.
_IS_CITUS = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"
# A close-out reads and writes by complete keys only. A generic plan made while the tables are empty would scan them,
# and keep scanning them until they are analyzed, a minute later: until then each batch would read every trace.
_BY_KEY = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
# A worker's session settings, sent at login; a pooler does not pass them on (deploy/pgbouncer/worker-role.sql).
WORKER_SETTINGS = _SERVER_SETTINGS | _BY_KEY


DATABASE_ERRORS = (
    DBAPIError,
    PoolTimeoutError,
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


# A libpq-style URL, or a function that is called for each session, because the password may change.
Url = str | Callable[[], str]


class Session(asyncpg.Connection):
    """A session that knows whether its server has Citus, and gives prepared statements globally unique names.

    asyncpg numbers them per process. Behind a pooler that mixes two workers' sessions, one name could run the other
    worker's statement; with unique names that is an error, and counts as an outage.
    """

    is_citus = False  # set at login

    def _get_unique_id(self, prefix: str) -> str:
        return f"{STATEMENT_PREFIX}{prefix}_{uuid4().hex}"


@dataclass(slots=True)
class ServerKind:
    """What the server is, as the last login found it."""

    is_citus: bool = False


def create_engine(
    url: Url,
    *,
    pool_size: int = 5,
    by_key: bool = False,
    command_timeout: float | None = COMMAND_TIMEOUT_SECONDS,
    server: ServerKind | None = None,
) -> AsyncEngine:
    """Return an engine for *url*; connects to nothing yet.

    *by_key* is for close-outs: scans are disabled, and a COMMIT waits at least for this server's disk. *server* is
    updated by each login.
    """

    async def connect(**_ignored: Any) -> asyncpg.Connection:  # noqa: ANN401 - SQLAlchemy's own arguments
        session = await open_session(
            url,
            connect_seconds=CONNECT_TIMEOUT_SECONDS,
            command_seconds=command_timeout,
            server_settings=WORKER_SETTINGS if by_key else _SERVER_SETTINGS,
        )
        if server is not None:
            server.is_citus = session.is_citus
        if by_key:
            await session.execute(_DURABLE)
        return session

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        # The last used connection has its statements prepared.
        pool_use_lifo=True,
    )


async def open_session(
    url: Url, *, connect_seconds: float, command_seconds: float | None, server_settings: Mapping[str, str]
) -> Session:
    """Return a new session; raises asyncpg's errors, or ``ConnectionError`` if TLS or the URL is at fault.

    asyncpg parses the URL, so sslmode, several hosts and target_session_attrs mean the same as in libpq. What it does
    not know is handled here: sslrootcert=system and load_balance_hosts. Files named in the URL are read for each
    session, so they can be renewed.
    """
    try:
        text_of_url = in_connect_order(url if isinstance(url, str) else url())
    except SettingsError as error:
        raise ConnectionError(one_line(error)) from error
    given = parameters(text_of_url)
    try:
        session = await asyncpg.connect(
            text_of_url,
            connection_class=Session,
            timeout=connect_seconds,
            command_timeout=command_seconds,
            server_settings=dict(server_settings),
            ssl=_system_roots(given) if given.get("sslrootcert") == SYSTEM_ROOTS else None,
        )
        try:
            session.is_citus = await session.fetchval(_IS_CITUS, timeout=connect_seconds)
            if session.is_citus:
                await session.execute("SET plan_cache_mode = auto", timeout=connect_seconds)
        except BaseException:  # also cancellation: the caller has not received this session
            session.terminate()
            raise
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if explanation := explain(error, _last_host(text_of_url, given)):
            raise explanation from error
        raise
    return session


def _system_roots(given: Mapping[str, str]) -> ssl.SSLContext:
    """Return a context that trusts the system's authorities and checks the host name, as libpq requires here."""
    context = ssl.create_default_context()
    if given.get("sslcert"):
        context.load_cert_chain(given["sslcert"], given.get("sslkey") or None, lambda: given.get("sslpassword", ""))
    return context


def _last_host(url: str, given: Mapping[str, str]) -> Server:
    """Return the host that asyncpg tries last, whose error it raises."""
    named = urlsplit(url).netloc.rpartition("@")[2] or given.get("host", "")
    host, _, port = named.rpartition(",")[2].rpartition(":")
    if not port.isdigit():  # no port, or part of an IPv6 address
        host, port = named.rpartition(",")[2], given.get("port", "5432").rpartition(",")[2]
    tls = given.get("sslmode") in CHECKING_MODES
    return Server(kind="postgresql", host=host.strip("[]"), port=int(port), tls=tls, given=given)


# Connections in addition to one per transaction: relay, probe, outbox gauges, and the rollback record.
SPARE_CONNECTIONS = 4
