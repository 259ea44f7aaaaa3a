"""The two servers as the commands need them: started together, described by environment variables."""

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
from servers.rabbitmq import USER, RabbitServer
from servers.server import start_all

MANAGEMENT = "rabbitmq_management"
DATABASE = "closeout"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def running_pair(
    folder: Path, version: Version, *, management: bool
) -> Iterator[tuple[PostgresServer, RabbitServer, dict[str, str]]]:
    """Start both below *folder*; yield them and the environment; leave nothing, not even the folder."""
    postgres = PostgresServer(folder / "postgresql")
    rabbit = RabbitServer(folder / "rabbitmq", version=version, plugins=[MANAGEMENT] if management else [])
    postgres.abandoned_files = rabbit.abandoned_files = (folder,)
    try:
        find_postgres()  # here and not in a thread of start_all: a signal can interrupt a download only here
        find_rabbitmq(version)
        start_all(postgres, rabbit)
        environment = {"DATABASE_URL": postgres.create_database(DATABASE), "AMQP_URL": rabbit.url()}
        if management:
            address = f"http://{USER}:{rabbit.password}@127.0.0.1:{rabbit.port_of(MANAGEMENT)}"
            environment["RABBITMQ_MANAGEMENT_URL"] = address
        yield postgres, rabbit, environment
    finally:
        _ignore_signals()  # one that comes now must not interrupt the taking down
        # Nothing of it is needed again, so it needs no graceful end.
        rabbit.kill()
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


def end_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP unwind the program, so that what was started is taken down."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        _ignore_signals()
        raise SystemExit(128 + number)

    for number in ENDING:
        signal.signal(number, end)


def _ignore_signals() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
