"""The operations that all private servers share: start, stop, kill, suspend."""

import contextlib
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from servers.ports import is_free
from servers.process import Command, ServerError, ServerProcess

READY_SECONDS = 90.0  # RabbitMQ 3.10 takes 6 s alone on two cores, longer next to other servers
POLL_SECONDS = 0.02
TAIL_LINES = 40
AMQP_HEADER = b"AMQP\0\0\x09\x01"
METHOD_FRAME = b"\1"


class Server(ABC):
    """A private server on 127.0.0.1 whose files are below *folder*.

    It never outlives this process. Port and data are the same after `restart`, and after `kill` and `start`.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    stop_seconds: ClassVar[float]
    port: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.log = self.folder / f"{self.name}.log"
        self.abandoned_files: Sequence[Path] = ()  # removed by the subreaper if this process dies first
        self._process: ServerProcess | None = None
        self._aborted = False
        self._lock = threading.RLock()

    @abstractmethod
    def _prepare(self) -> Sequence[Command]:
        """Write the files that the server needs; return the commands to run, the server's own last."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Return whether the server accepts work."""

    def _outside_files(self) -> Sequence[Path]:
        """Return the files outside the folder that the subreaper removes if this process dies first."""
        return ()

    def _pid_file(self) -> Path | None:
        """Return the file that names a System V segment to release after a kill."""
        return None

    @property
    def running(self) -> bool:
        """Whether the server's process is alive; also true while it is suspended."""
        return self._process is not None and self._process.alive

    def start(self, *, seconds: float = READY_SECONDS) -> Self:
        """Start the server and return once it is ready.

        Raises ServerError with the end of its log if it ends first or takes longer than *seconds*.
        """
        with self._lock:
            if self.running:
                raise ServerError(f"{self.name} in {self.folder} is already running")
            if not is_free(self.port):
                # Another process on the port could be taken for this server.
                raise ServerError(f"{self.name} cannot start: port {self.port} is taken")
            self._aborted = False
            self.folder.mkdir(parents=True, exist_ok=True)
            self._process = ServerProcess(
                self._prepare(),
                log=self.log,
                remove_when_abandoned=[*self._outside_files(), *self.abandoned_files],
                postmaster_pid=self._pid_file(),
            )
            self._await_ready(self._process, seconds)
            return self

    def _await_ready(self, process: ServerProcess, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._is_ready():
            late = time.monotonic() > deadline
            if late or self._aborted or not process.alive:
                process.kill()
                reason = f"was not ready within {seconds:.0f} s" if late else "ended while starting"
                raise ServerError(f"{self.name} {reason}; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Stop gracefully, also while suspended; does nothing if the server is down."""
        with self._lock:
            if self._process is not None and self._process.alive:
                self._process.resume()
                self._process.send(self.stop_signal)
                if not self._process.wait(self.stop_seconds):
                    self._process.kill()
            self._process = None

    def kill(self) -> None:
        """SIGKILL all processes of the server, as in a power failure; does nothing if it is down.

        Aborts a `start` in another thread.
        """
        self.abort_start()
        if self._process is not None:
            self._process.kill()
        with self._lock:
            if self._process is not None:
                self._process.kill()
            self._process = None

    def abort_start(self) -> None:
        """Make a `start` in another thread raise ServerError at its next poll."""
        self._aborted = True

    def restart(self) -> Self:
        """Stop gracefully, then start again."""
        with self._lock:
            self.stop()
            return self.start()

    def suspend(self) -> None:
        """SIGSTOP all processes of the server: connections stay open, but nothing responds."""
        self._alive().suspend()

    def resume(self) -> None:
        """Resume a suspended server."""
        self._alive().resume()

    def _alive(self) -> ServerProcess:
        if self._process is None or not self._process.alive:
            raise ServerError(f"{self.name} in {self.folder} is not running")
        return self._process

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last *lines* of the server's output."""
        try:
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no output)"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def start_all(*servers: Server) -> None:
    """Start *servers* concurrently; if one fails, all are killed."""
    with ThreadPoolExecutor(len(servers)) as pool:
        try:
            for start in as_completed([pool.submit(server.start) for server in servers]):
                start.result()
        except BaseException:
            for server in servers:
                server.abort_start()
            for server in servers:
                server.kill()
            raise


def accepts_connections(port: int) -> bool:
    """Return whether a process listens on *port*."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def answers_amqp(port: int, *, seconds: float = 1.0) -> bool:
    """Return whether a broker on *port* answers the protocol header with a method frame."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.sendall(AMQP_HEADER)
        return connection.recv(1) == METHOD_FRAME
    return False
