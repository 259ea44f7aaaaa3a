"""Errors classified by who must act: the sender, the infrastructure, or a developer.

:func:`fault_of` is the only function that knows the client libraries' error classes.
"""

import asyncio
from collections.abc import Iterator
from enum import Enum

import aiormq.exceptions
import asyncpg
from sqlalchemy import exc as sa

from consumer.contract.refusals import MessageRefusedError


class UnavailableError(Exception):
    """A dependency is unavailable or timed out. Transient: not counted as a delivery attempt."""


class Fault(Enum):
    """The class of an error; it decides how the delivery is settled."""

    MESSAGE = "message"  # parked at once
    TRANSIENT = "transient"  # an outage: requeued, not counted
    UNKNOWN = "unknown"  # counts against the run


# Transient SQLSTATE classes and codes (PostgreSQL 18, appendix A).
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
        "25P03",  # idle_in_transaction_session_timeout: the worker or the machine was suspended
        "25P04",  # transaction_timeout
        "26000", "42P05",  # prepared statement missing or duplicate: a pooler mixes sessions
        "28000", "28P01",  # authorization: a password or role is being rotated
        "3D000", "3F000",  # the database or schema does not exist (yet)
        _INSUFFICIENT_PRIVILEGE,  # revoked, or not granted yet; not caused by a message
        "42P01", "42703",  # table or column missing: migrations are behind
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
    asyncpg.InternalClientError,  # the server ended the session; the client has not seen the close yet
    asyncpg.TargetServerAttributeNotMatched,  # no primary among the hosts: a failover is in progress
    aiormq.exceptions.AMQPError,
    aiormq.exceptions.ChannelInvalidStateError,  # not an AMQPError: the channel closed during a call
    asyncio.IncompleteReadError,
)


def fault_of(error: BaseException) -> Fault:
    """Classify *error* by itself and its causes; an unforeseen error is ``UNKNOWN``."""
    for link in links(error):
        if isinstance(link, MessageRefusedError):
            return Fault.MESSAGE
        if isinstance(
            link, asyncpg.InvalidCachedStatementError
        ):  # its SQLSTATE, 0A000, is shared with many other errors
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
    """Return whether one run of a batch may have caused *error*, so that isolating it helps."""
    return fault_of(error) is Fault.UNKNOWN


def lacks_privilege(error: BaseException) -> bool:
    """Return whether PostgreSQL denied a privilege; retrying does not help until it is granted."""
    return any(sqlstate_of(link) == _INSUFFICIENT_PRIVILEGE for link in links(error))


def refusal_in(error: BaseException) -> MessageRefusedError:
    """Return the refusal in *error*'s chain; call it only when :func:`fault_of` returned ``MESSAGE``."""
    return next(link for link in links(error) if isinstance(link, MessageRefusedError))


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE that *error* carries, if the server sent one."""
    if isinstance(error, sa.DBAPIError):
        state = getattr(error.orig, "sqlstate", None)
    else:
        state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else None


def links(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and its causes, in order."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = getattr(link, "cause", None) or getattr(link, "orig", None) or link.__cause__


def one_line(error: BaseException, limit: int = 500) -> str:
    """Return the message of *error* on one line, without text that may quote a run.

    Omitted are SQLAlchemy's statement and parameters, and PostgreSQL's DETAIL, which contains the refused row.
    """
    origin = error.orig if isinstance(error, sa.DBAPIError) and error.orig is not None else error
    text = str(origin.args[0]) if isinstance(origin, asyncpg.PostgresError) and origin.args else str(origin)
    line = " ".join(text.split()) or type(origin).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
