"""PostgreSQL and RabbitMQ started together, with their addresses as environment variables."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from servers.binaries.postgres import find_postgres
from servers.binaries.rabbitmq import Version, find_rabbitmq
from servers.postgres import PostgresServer
from servers.rabbitmq import CONSISTENT_HASH, USER, RabbitServer
from servers.server import start_all

MANAGEMENT = "rabbitmq_management"
DATABASE = "closeout"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def running_pair(
    folder: Path, version: Version, *, management: bool, database: type[PostgresServer] = PostgresServer
) -> Iterator[tuple[PostgresServer, RabbitServer, dict[str, str]]]:
    """Start both below *folder* and yield them and the environment; then kill both and remove *folder*."""
    postgres = database(folder / "postgresql")
    rabbit = RabbitServer(
        folder / "rabbitmq", version=version, plugins=[CONSISTENT_HASH, *([MANAGEMENT] if management else [])]
    )
    postgres.abandoned_files = rabbit.abandoned_files = (folder,)
    try:
        find_postgres()  # before start_all: a signal interrupts a download only in the main thread
        find_rabbitmq(version)
        start_all(postgres, rabbit)
        environment = {"DATABASE_URL": postgres.create_database(DATABASE), "AMQP_URL": rabbit.url()}
        if management:
            address = f"http://{USER}:{rabbit.password}@127.0.0.1:{rabbit.port_of(MANAGEMENT)}"
            environment["RABBITMQ_MANAGEMENT_URL"] = address
        yield postgres, rabbit, environment
    finally:
        _ignore_signals()  # a signal must not interrupt the cleanup
        # Killed, not stopped: their data are removed.
        rabbit.kill()
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


def end_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise SystemExit, so that servers are killed and folders removed."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        _ignore_signals()
        raise SystemExit(128 + number)

    for number in ENDING:
        signal.signal(number, end)


def _ignore_signals() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
