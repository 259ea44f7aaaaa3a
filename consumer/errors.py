"""What can go wrong, by who must act: the sender, nobody (the weather), or us.

Client libraries' errors are placed by :func:`fault_of`, the only function that knows their classes.
"""

import asyncio
from collections.abc import Iterator
from enum import Enum

import aiormq.exceptions
import asyncpg
from sqlalchemy import exc as sa

from consumer.contract.refusals import MessageRefusedError


class UnavailableError(Exception):
    """The weather: a server is away, or does not answer in time. Nobody is to blame and nothing is counted."""


class Fault(Enum):
    """Whose fault an error is; it decides what happens to the delivery."""

    MESSAGE = "message"
    TRANSIENT = "transient"
    UNKNOWN = "unknown"


# SQLSTATE classes and codes that pass by themselves. PostgreSQL 18, appendix A.
_TRANSIENT_CLASSES = (
    "08",  # connection exception
    "40",  # serialization failure, deadlock
    "53",  # insufficient resources: too many connections, disk full
    "57",  # operator intervention: shutdown, starting up, statement timeout
    "58",  # system error: an I/O error below PostgreSQL
)
_INSUFFICIENT_PRIVILEGE = "42501"
_TRANSIENT_CODES = frozenset(
    {
        "25006",  # read_only_sql_transaction: a standby after failover
        "25P03",  # idle_in_transaction_session_timeout: the worker or the machine stood still
        "25P04",  # transaction_timeout
        "26000", "42P05",  # no such prepared statement, or there is one: a pooler that does not keep them apart
        "28000", "28P01",  # authorization: a password or role that is being rotated; an outage until it is put right
        "3D000", "3F000",  # the database or schema is not there (yet)
        _INSUFFICIENT_PRIVILEGE,  # revoked, or not granted yet; no message is to blame
        "42P01", "42703",  # table or column not there (yet): migrations are behind
        "55P03",  # lock_not_available: lock_timeout
        "55006",  # object in use
        "XX000",  # internal error
    }
)  # fmt: skip

_TRANSIENT_ERRORS = (
    UnavailableError,
    TimeoutError,
    ConnectionError,
    OSError,
    sa.TimeoutError,  # no connection became free in the pool
    asyncpg.InterfaceError,  # the connection was closed under the statement
    asyncpg.InternalClientError,  # the session was ended, and the end of the line is not seen yet
    asyncpg.TargetServerAttributeNotMatched,  # no primary among the URL's hosts: a failover is under way
    aiormq.exceptions.AMQPError,
    aiormq.exceptions.ChannelInvalidStateError,  # no AMQPError: the channel closed under a call
    asyncio.IncompleteReadError,
)


def fault_of(error: BaseException) -> Fault:
    """Say whose fault *error* is; its causes count, and what nobody foresaw is unknown."""
    for link in links(error):
        if isinstance(link, MessageRefusedError):
            return Fault.MESSAGE
        if isinstance(link, asyncpg.InvalidCachedStatementError):  # its SQLSTATE, 0A000, is that of much else
            return Fault.TRANSIENT
        state = sqlstate_of(link)
        if state is not None:
            transient = state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_CODES
            return Fault.TRANSIENT if transient else Fault.UNKNOWN
        if isinstance(link, sa.DBAPIError) and link.connection_invalidated:
            return Fault.TRANSIENT
        if isinstance(link, _TRANSIENT_ERRORS):
            return Fault.TRANSIENT
    return Fault.UNKNOWN


def lies_in_data(error: BaseException) -> bool:
    """Say whether *error* may be the fault of one run among several, so that isolating it helps."""
    return fault_of(error) is Fault.UNKNOWN


def lacks_a_right(error: BaseException) -> bool:
    """Say whether PostgreSQL refused for want of a right: nothing that waiting mends unless somebody grants it."""
    return any(sqlstate_of(link) == _INSUFFICIENT_PRIVILEGE for link in links(error))


def refusal_in(error: BaseException) -> MessageRefusedError:
    """Return the refusal that made :func:`fault_of` blame the message for *error*."""
    return next(link for link in links(error) if isinstance(link, MessageRefusedError))


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE that *error* carries, if the server sent one."""
    if isinstance(error, sa.DBAPIError):
        state = getattr(error.orig, "sqlstate", None)
    else:
        state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else None


def links(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and, one after the other, what caused it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = getattr(link, "cause", None) or getattr(link, "orig", None) or link.__cause__


def one_line(error: BaseException, limit: int = 500) -> str:
    """Return *error*'s own words on one line, without what may quote a run.

    That is SQLAlchemy's statement and parameters, and PostgreSQL's DETAIL, which shows the row that was refused.
    """
    origin = error.orig if isinstance(error, sa.DBAPIError) and error.orig is not None else error
    text = str(origin.args[0]) if isinstance(origin, asyncpg.PostgresError) and origin.args else str(origin)
    words = " ".join(text.split()) or type(origin).__name__
    return words if len(words) <= limit else words[: limit - 1] + "…"
