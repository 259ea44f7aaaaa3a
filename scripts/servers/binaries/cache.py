"""The cache folder of fetched programs, and its locks."""

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
    """Hold the lock of *target*, so that one process at a time creates it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
