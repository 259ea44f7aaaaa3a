"""A streaming standby of a private PostgreSQL."""

import time
from pathlib import Path

from servers.postgres import PostgresServer
from servers.process import ServerError

STREAMING_SECONDS = 30.0


class PostgresStandby(PostgresServer):
    """A hot standby of *primary*, which must be running when the standby starts for the first time."""

    name = "postgresql-standby"

    def __init__(self, folder: Path, primary: PostgresServer) -> None:
        super().__init__(folder)
        self._primary = primary

    def follow(self) -> None:
        """Make replication synchronous: the primary confirms a COMMIT only after this standby has it on disk.

        Without it, a transaction that was committed just before the primary died could be lost.
        """
        self._primary.psql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._primary.psql("SELECT pg_reload_conf()")
        deadline = time.monotonic() + STREAMING_SECONDS
        while self._primary.psql("SELECT sync_state FROM pg_stat_replication") != "sync":
            if time.monotonic() > deadline:
                raise ServerError(f"the standby does not follow; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(0.05)

    def promote(self) -> None:
        """Promote this standby and return once it accepts writes; the old primary must be dead."""
        if self.psql("SELECT pg_promote()") != "t":
            raise ServerError("the standby was not promoted in time")

    def _initialise(self, data: Path, identity: tuple[int, int] | None) -> None:
        backup = ["pg_basebackup", "-D", str(data), "-d", self._primary.url(), "-R", "-X", "stream"]
        self._make(data, [*backup, "--checkpoint=fast", "--no-sync"], identity)
