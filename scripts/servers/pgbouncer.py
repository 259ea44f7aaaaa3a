"""A private PgBouncer in front of a private PostgreSQL."""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg

from servers.binaries.debian_program import PGBOUNCER
from servers.ports import Port
from servers.postgres import SUPERUSER, UNPRIVILEGED, query
from servers.process import Command
from servers.server import Server

ADMIN_DATABASE = "pgbouncer"


class PgBouncerServer(Server):
    """PgBouncer on 127.0.0.1 in front of the server at *postgres_port*; *users* need no password.

    *settings* are lines of its section ``[pgbouncer]``; `start` reads them.
    """

    name = "pgbouncer"
    stop_signal = signal.SIGINT  # a "safe" shutdown: it waits for running transactions
    stop_seconds = 30.0

    def __init__(
        self, folder: Path, *, postgres_port: int, users: Sequence[str], settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(folder)
        self._port = Port()
        self.port = self._port.number
        self.postgres_port = postgres_port
        self.users = list(users)
        self.settings = dict(settings or {})

    def url(self, database: str, *, user: str = SUPERUSER) -> str:
        """Return the URL of *database*; no password is required."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def show(self, name: str) -> list[list[str | None]]:
        """Return the rows of ``SHOW`` *name* on the admin console."""
        return query(self.port, f"SHOW {name}", user=SUPERUSER, database=ADMIN_DATABASE)

    def _prepare(self) -> Sequence[Command]:
        program = PGBOUNCER.find() / "usr/sbin/pgbouncer"
        names = sorted({SUPERUSER, *self.users})
        auth_file = self.folder / "users.txt"
        auth_file.write_text("".join(f'"{name}" ""\n' for name in names))
        settings = {
            **self.settings,
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(auth_file),
            "admin_users": SUPERUSER,
        }
        if os.geteuid() == 0:
            # PgBouncer does not run as root. It switches the user itself, which may not reach the program.
            settings["user"] = UNPRIVILEGED
        lines = ["[databases]", f"* = host=127.0.0.1 port={self.postgres_port}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        configuration = self.folder / "pgbouncer.ini"
        configuration.write_text("\n".join(lines) + "\n")
        argv = [str(program), str(configuration)]
        return [Command(argv=argv, env={"PATH": "/usr/bin:/bin"}, cwd=str(self.folder))]

    def _is_ready(self) -> bool:
        try:
            return bool(self.show("VERSION"))
        except psycopg.Error:
            return False
