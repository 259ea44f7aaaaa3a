"""Where what was fetched is kept, and one process at a time that puts something there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return $CLOSEOUT_CACHE, else the user's cache folder."""
    if named := os.environ.get("CLOSEOUT_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "closeout"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from making *target* meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
