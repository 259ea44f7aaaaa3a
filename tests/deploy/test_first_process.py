"""A worker that is process 1, as in a container, exits on signals although the kernel ignores their default action."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from servers.ports import Port

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 and "CI" not in os.environ, reason="not run: a PID namespace needs root"
)
DEADLINE_SECONDS = 60


@contextmanager
def process_one(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Start a worker without servers in a PID namespace; yield its parent, and its pid outside the namespace."""
    port = Port().number
    environ = {
        "DATABASE_URL": "postgresql://closeout@127.0.0.1:1/none",
        "AMQP_URL": "amqp://127.0.0.1:1",
        "HTTP_HOST": "127.0.0.1",
        "HTTP_PORT": str(port),
    }
    command = ["unshare", "--pid", "--fork", "--kill-child", str(Path(sys.executable).with_name("closeout")), "worker"]
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen(command, env={**os.environ, **environ}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_live(port):
            assert parent.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield parent, int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
    finally:
        parent.kill()
        parent.wait()


def is_live(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5):
        return True
    return False


def test_the_first_signal_ends_process_one_with_status_0(tmp_path):
    with process_one(tmp_path) as (parent, worker):
        os.kill(worker, signal.SIGTERM)
        assert parent.wait(DEADLINE_SECONDS) == 0
    assert '"stopped"' in (tmp_path / "log").read_text()


def test_a_second_signal_ends_process_one_at_once(tmp_path):
    with process_one(tmp_path) as (parent, worker):
        os.kill(worker, signal.SIGSTOP)  # so that both signals arrive before the worker has stopped
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGCONT)
        assert parent.wait(DEADLINE_SECONDS) in {128 + signal.SIGTERM, 128 + signal.SIGINT}
    assert "second signal: exiting immediately" in (tmp_path / "log").read_text()
