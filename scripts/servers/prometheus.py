"""A private Prometheus."""

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from servers.binaries.debian_program import PROMETHEUS
from servers.ports import Port
from servers.process import Command, ServerError
from servers.server import Server

RESPONSE_SECONDS = 10.0


class PrometheusServer(Server):
    """Prometheus on 127.0.0.1: scrapes *targets*, by job, and evaluates *rules* every second."""

    name = "prometheus"
    stop_signal = signal.SIGTERM
    stop_seconds = 30.0

    def __init__(self, folder: Path, *, targets: Mapping[str, Sequence[str]], rules: Sequence[Path] = ()) -> None:
        super().__init__(folder)
        self._port = Port()
        self.port = self._port.number
        self._targets = targets
        self._rules = rules

    def query(self, promql: str, *, at: float | None = None) -> list[dict[str, Any]]:
        """Return the series of *promql* now, or at Unix time *at*, in the format of the HTTP API.

        Raises ServerError with the message of Prometheus.
        """
        time = {} if at is None else {"time": str(at)}
        return list(self.api("query", query=promql, **time)["result"])

    def api(self, path: str, **parameters: str) -> dict[str, Any]:
        """Return the data of ``/api/v1/PATH``."""
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=RESPONSE_SECONDS) as response:
                return dict(json.load(response)["data"])
        except urllib.error.HTTPError as error:
            raise ServerError(f"prometheus: {json.load(error)['error']}: {parameters}") from None

    def _prepare(self) -> Sequence[Command]:
        configuration = self.folder / "prometheus.json"  # JSON is YAML
        configuration.write_text(json.dumps(self._configuration()))
        argv = [
            str(PROMETHEUS.find() / "usr/bin/prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        return [Command(argv=argv, env={"PATH": "/usr/bin:/bin"}, cwd=str(self.folder))]

    def _configuration(self) -> dict[str, Any]:
        return {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path.absolute()) for path in self._rules],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": list(targets)}]}
                for job, targets in self._targets.items()
            ],
        }

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=RESPONSE_SECONDS):
                return True
        except OSError:
            return False
