"""Runs closeout's commands, and prepares a database and a broker with them."""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from servers.process import ServerError

CLOSEOUT = str(Path(sys.executable).with_name("closeout"))
POLICIES = Path(__file__).with_name("policies.yaml")


def closeout(environment: Mapping[str, str], *arguments: str, accepted: Collection[int] = (0,)) -> str:
    """Run a closeout command and return its output; raise ServerError for an exit status not in *accepted*."""
    done = subprocess.run(
        [CLOSEOUT, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode not in accepted:
        raise ServerError(f"closeout {' '.join(arguments)} exited with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def set_up(environment: Mapping[str, str]) -> None:
    """Migrate the database, declare the topology and apply the demonstration's policies."""
    with ThreadPoolExecutor() as pool:
        declared = pool.submit(closeout, environment, "topology")
        closeout(environment, "migrate")
        closeout(environment, "policies", "apply", str(POLICIES))
        declared.result()
