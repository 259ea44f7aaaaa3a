"""Shared by all commands that use a server: settings, an engine, and error messages."""

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
# SQLSTATEs: undefined table, column or schema.
_MISSING = {"42P01", "42703", "3F000"}


def settings_for(*, need_amqp: bool = True, need_database: bool = True) -> Settings:
    """Return the settings and configure logs; if settings are invalid, report every fault and end with status 2."""
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
    """Run *work* with an engine for DATABASE_URL; end with status 1 and the reason if the database is unavailable."""
    settings = settings_for(need_amqp=False)

    async def run() -> T:
        url = settings.database_url.get_secret_value()
        engine = create_engine(url, pool_size=1, command_timeout=command_timeout)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return run_to_end(run())


def run_to_end(work: Awaitable[T]) -> T:
    """Run *work* and return its result; if a server is unavailable, end with status 1 and the reason."""

    async def run() -> T:
        return await work

    try:
        return asyncio.run(run())
    except UnavailableError as error:
        fail(str(error))
    except DATABASE_ERRORS as error:
        fail(describe_database_error(error))


def describe_database_error(error: BaseException) -> str:
    """Return what PostgreSQL refused, or that it is unavailable, and what to do if that is known."""
    hint = ""
    if lacks_privilege(error):
        hint = "; deploy/README.md lists the role that each command needs"
    elif any(sqlstate_of(link) in _MISSING for link in links(error)):
        hint = "; the schema does not exist or is older than this version: run closeout migrate"
    return f"PostgreSQL: {one_line(error)}{hint}"


def exit_after(seconds: float) -> None:
    """Exit with status 0 in *seconds*, even if something blocks; from a thread, because the event loop may block too.

    Closing a stalled connection properly takes longer than any grace period. Nothing is lost: with its connection a
    transaction is rolled back and a delivery requeued, and the next delivery finds what was committed.
    """

    def end() -> None:
        log.warning("shutdown grace period exceeded; exiting", seconds=seconds)
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
