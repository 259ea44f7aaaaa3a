"""A worker as tests see it from outside."""

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from tests.support.http import request
from tests.support.waiting import PATIENCE, until

_TICKS = os.sysconf("SC_CLK_TCK")


class RunningWorker:
    """A worker as seen from outside: its HTTP server, and its process where it has its own."""

    def __init__(self, port: int, process: asyncio.subprocess.Process | None = None, log: Path | None = None) -> None:
        self.port, self.process, self._log = port, process, log

    @property
    def alive(self) -> bool:
        return self.process is None or self.process.returncode is None

    def records(self) -> list[dict[str, Any]]:
        """Return the records that the process has logged; a line that is not JSON raises."""
        return [json.loads(line) for line in self.lines() if line.endswith("\n")]

    def lines(self) -> list[str]:
        assert self._log is not None
        return self._log.read_text().splitlines(keepends=True)

    def cpu_seconds(self) -> float:
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    async def find_port(self) -> None:
        """Wait until the process has logged where it serves HTTP."""
        assert self.process is not None

        def started() -> list[dict[str, Any]]:
            assert self.alive, self.lines()
            return self.records()

        self.port = int((await until(started, what="the first log line"))[0]["http"].rpartition(":")[2])

    async def get(self, path: str) -> tuple[int, str]:
        response = await request(self.port, path)
        return response.status, response.body

    async def ready(self) -> bool:
        return (await self.get("/readyz"))[0] == 200

    async def state(self) -> dict[str, Any]:
        return dict(json.loads((await self.get("/readyz"))[1]))

    async def metric(self, series: str) -> float:
        """Return the value of *series*, written as in the exposition; 0 where it does not exist yet."""
        body = (await self.get("/metrics"))[1]
        found = re.search(rf"^{re.escape(series)} (\S+)$", body, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> int:
        """Send SIGTERM, wait for the end and return the exit status."""
        assert self.process is not None
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), PATIENCE)
