"""A streaming standby of a private PostgreSQL, ready to take over."""

import time
from pathlib import Path

from servers.postgres import PostgresServer
from servers.process import ServerError

STREAMING_SECONDS = 30.0


class PostgresStandby(PostgresServer):
    """A hot standby of *primary*, which must run while this one is started for the first time."""

    name = "postgresql-standby"

    def __init__(self, folder: Path, primary: PostgresServer) -> None:
        super().__init__(folder)
        self._primary = primary

    def follow(self) -> None:
        """Return once the primary answers a COMMIT only after this standby has it on disk.

        Without that, what was committed and acked just before the primary died would be lost with it.
        """
        self._primary.psql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._primary.psql("SELECT pg_reload_conf()")
        deadline = time.monotonic() + STREAMING_SECONDS
        while self._primary.psql("SELECT sync_state FROM pg_stat_replication") != "sync":
            if time.monotonic() > deadline:
                raise ServerError(f"the standby does not follow; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(0.05)

    def promote(self) -> None:
        """Take over as primary; the old one must be dead. Returns once writes are taken."""
        if self.psql("SELECT pg_promote()") != "t":
            raise ServerError("the standby was not promoted in time")

    def _initialise(self, data: Path, identity: tuple[int, int] | None) -> None:
        copied = ["pg_basebackup", "-D", str(data), "-d", self._primary.url(), "-R", "-X", "stream"]
        self._make(data, [*copied, "--checkpoint=fast", "--no-sync"], identity)
