"""The engine: SQLAlchemy over asyncpg, with every wait bounded."""

import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from config.settings import SettingsError
from config.urls import CHECKING_MODES, SYSTEM_ROOTS, parameters
from consumer.errors import one_line
from consumer.tls_errors import Server, explained
from domains.database.pooling import STATEMENT_PREFIX

if TYPE_CHECKING:
    pass

# Seconds to connect, one host; a host that is down refuses at once, one that is cut off stays silent.
CONNECT_TIMEOUT_SECONDS = 5.0
# Seconds that a statement may take by the server's clock, then by ours: the second one notices a stalled line.
STATEMENT_TIMEOUT_SECONDS = 15.0
COMMAND_TIMEOUT_SECONDS = 20.0
# Seconds to wait for a row or a table that somebody else holds: another worker's commit takes milliseconds.
LOCK_TIMEOUT_SECONDS = 5.0
# Seconds after which the server ends a transaction whose worker has stopped, and frees what it locked.
IDLE_TRANSACTION_SECONDS = 30.0
# Seconds to wait for a connection of the pool.
POOL_TIMEOUT_SECONDS = 10.0

_SERVER_SETTINGS = {
    "application_name": "closeout",
    "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS:.0f}s",
    "lock_timeout": f"{LOCK_TIMEOUT_SECONDS:.0f}s",
    "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_SECONDS:.0f}s",
    # A plan for 50 rows is right for one row too, and planning costs more than running these statements.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}

# A close-out reads and writes by whole keys only. A generic plan made while the tables are empty would scan them, and
# go on scanning them as they grow, until they are analyzed: a minute, in which a batch reads every trace there is.
_BY_KEY = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
# All that a worker asks of its sessions at login; a pooler does not pass it on (deploy/pgbouncer/worker-role.sql).
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


# A libpq-style URL, or what returns it as it is now: one for each session, for its password may have been changed.
Url = str | Callable[[], str]


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """Names its prepared statements like nobody else, SQLAlchemy's and those that go straight to the driver.

    The driver counts them anew in each process. Behind a pooler that does not tell two workers' statements apart, the
    same name could run the other's; so it is an error, and an outage.
    """

    def _get_unique_id(self, prefix: str) -> str:
        return f"{STATEMENT_PREFIX}{prefix}_{uuid4().hex}"


def create_engine(
    url: Url,
    *,
    pool_size: int = 5,
    by_key: bool = False,
    command_timeout: float | None = COMMAND_TIMEOUT_SECONDS,
) -> AsyncEngine:
    """Return an engine for *url*; nothing is connected yet. *by_key*: for close-outs, which never scan."""

    async def connect(**_ignored: Any) -> asyncpg.Connection:  # noqa: ANN401 - SQLAlchemy's own arguments
        return await open_session(
            url,
            connect_seconds=CONNECT_TIMEOUT_SECONDS,
            command_seconds=command_timeout,
            server_settings=WORKER_SETTINGS if by_key else _SERVER_SETTINGS,
        )

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        # The last used connection is the one whose statements are prepared and warm.
        pool_use_lifo=True,
    )


async def open_session(
    url: Url, *, connect_seconds: float, command_seconds: float | None, server_settings: Mapping[str, str]
) -> asyncpg.Connection:
    """Return a new session; raises asyncpg's errors, or ``ConnectionError`` in words where TLS or the URL is at fault.

    asyncpg reads the URL itself, so sslmode, several hosts and target_session_attrs mean what libpq says they mean;
    sslrootcert=system it does not know. Files that the URL names are read for each session, so they can be renewed.
    """
    try:
        text_of_url = url if isinstance(url, str) else url()
    except SettingsError as error:
        raise ConnectionError(one_line(error)) from error
    given = parameters(text_of_url)
    try:
        return await asyncpg.connect(
            text_of_url,
            connection_class=_Connection,
            timeout=connect_seconds,
            command_timeout=command_seconds,
            server_settings=dict(server_settings),
            ssl=_system_roots(given) if given.get("sslrootcert") == SYSTEM_ROOTS else None,
        )
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if told := await explained(error, _last_host(text_of_url, given)):
            raise told from error
        raise


def _system_roots(given: Mapping[str, str]) -> ssl.SSLContext:
    """Trust whom the machine trusts, for the host in the URL only: sslmode=verify-full, which libpq asks for here."""
    context = ssl.create_default_context()
    if given.get("sslcert"):
        context.load_cert_chain(given["sslcert"], given.get("sslkey") or None, lambda: given.get("sslpassword", ""))
    return context


def _last_host(url: str, given: Mapping[str, str]) -> Server:
    """Return the host that asyncpg tries last: the one whose error it raises."""
    named = urlsplit(url).netloc.rpartition("@")[2] or given.get("host", "")
    host, _, port = named.rpartition(",")[2].rpartition(":")
    if not port.isdigit():  # none is given, or this was half of an IPv6 address
        host, port = named.rpartition(",")[2], given.get("port", "5432").rpartition(",")[2]
    tls = given.get("sslmode") in CHECKING_MODES
    return Server(kind="postgresql", host=host.strip("[]"), port=int(port), tls=tls, given=given)


# Connections beside one a transaction: the relay's, the probe's, the look at the outbox, and the record of a rollback.
SPARE_CONNECTIONS = 4
