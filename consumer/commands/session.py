"""What every command that talks to a server needs: settings, an engine, and errors in words."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from config.logs import configure_logs
from config.settings import Settings, SettingsError, load_settings
from consumer.commands.output import EXIT_USAGE, fail
from consumer.errors import UnavailableError, lacks_privilege, links, one_line, sqlstate_of
from consumer.postgres.engine import COMMAND_TIMEOUT_SECONDS, DATABASE_ERRORS, create_engine

log = structlog.get_logger(__name__)
T = TypeVar("T")
# SQLSTATEs of a table, a column, a schema that is not there.
_MISSING = {"42P01", "42703", "3F000"}


def settings_for(*, need_amqp: bool = True, need_database: bool = True) -> Settings:
    """Return the settings, with logs set up; end with status 2 and every fault in words where they are wrong."""
    try:
        settings = load_settings(need_amqp=need_amqp, need_database=need_database)
    except SettingsError as error:
        fail(str(error), status=EXIT_USAGE)
    configure_logs(settings.log_level, settings.log_format)
    for warning in settings.warnings:
        log.warning(warning)
    return settings


def with_database(
    work: Callable[[AsyncEngine], Awaitable[T]], *, command_timeout: float | None = COMMAND_TIMEOUT_SECONDS
) -> T:
    """Run *work* with an engine for DATABASE_URL; end with status 1 and the reason where the database is away."""
    settings = settings_for(need_amqp=False)

    async def run() -> T:
        url = settings.database_url.get_secret_value()
        engine = create_engine(url, pool_size=1, command_timeout=command_timeout)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return in_words(run())


def in_words(work: Awaitable[T]) -> T:
    """Run *work* to its end; a server that is away ends the command with status 1 and the reason."""

    async def run() -> T:
        return await work

    try:
        return asyncio.run(run())
    except UnavailableError as error:
        fail(str(error))
    except DATABASE_ERRORS as error:
        fail(database_words(error))


def database_words(error: BaseException) -> str:
    """Return what PostgreSQL refused, or that it is away, and what to do where that can be told from it."""
    hint = ""
    if lacks_privilege(error):
        hint = "; README, Least privilege, says which role each command is for"
    elif any(sqlstate_of(link) in _MISSING for link in links(error)):
        hint = "; the schema is not there, or older than this version: run closeout migrate"
    return f"PostgreSQL: {one_line(error)}{hint}"


def end_after(seconds: float) -> None:
    """End this process in *seconds*, whatever still hangs, with status 0; from a thread, for the loop may hang too.

    Closing a stalled line politely takes longer than any grace period. Nothing is lost by not doing so: a transaction
    is rolled back and a delivery given back with its connection, and the next delivery finds what was committed.
    """

    def end() -> None:
        log.warning("grace period over: ending without closing what hangs", seconds=seconds)
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
