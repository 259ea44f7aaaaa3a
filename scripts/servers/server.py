"""What both servers have in common: the ways to start, hurt and stop one."""

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from servers.ports import is_free
from servers.process import Command, KeptProcess, ServerError

READY_SECONDS = 90.0  # RabbitMQ 3.10 takes 6 s alone on two cores; many at once take their turns
POLL_SECONDS = 0.02
TAIL_LINES = 40


class Server(ABC):
    """A private server on 127.0.0.1 whose files are below *folder*.

    Nothing of it outlives this process. Port and data are the same after `restart`, and after `kill` and `start`.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    stop_seconds: ClassVar[float]
    port: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.log = self.folder / f"{self.name}.log"
        self.abandoned_files: Sequence[Path] = ()  # what the keeper removes if we are killed while it runs
        self._process: KeptProcess | None = None
        self._ending = False
        self._turn = threading.RLock()

    @abstractmethod
    def _prepare(self) -> Sequence[Command]:
        """Write what the server needs to start; return the commands, the server's own the last."""

    @abstractmethod
    def _answers(self) -> bool:
        """Tell whether the server does what it is for."""

    def _belongings(self) -> Sequence[Path]:
        """Return what lies outside of the folder and must go when we are killed."""
        return ()

    def _pid_file(self) -> Path | None:
        """Return the file that names a System V segment to release after a kill."""
        return None

    @property
    def running(self) -> bool:
        """Whether the server's process is alive, suspended or not."""
        return self._process is not None and self._process.alive

    def start(self, *, seconds: float = READY_SECONDS) -> Self:
        """Start the server and return once it answers.

        Raises ServerError with the end of its log if it ends first or takes longer than *seconds*.
        """
        with self._turn:
            if self.running:
                raise ServerError(f"{self.name} in {self.folder} is already running")
            if not is_free(self.port):
                # Whoever is there might answer in our server's place.
                raise ServerError(f"{self.name} cannot start: port {self.port} is taken")
            self._ending = False
            self.folder.mkdir(parents=True, exist_ok=True)
            self._process = KeptProcess(
                self._prepare(),
                log=self.log,
                remove_when_abandoned=[*self._belongings(), *self.abandoned_files],
                postmaster_pid=self._pid_file(),
            )
            self._await_answer(self._process, seconds)
            return self

    def _await_answer(self, process: KeptProcess, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._answers():
            late = time.monotonic() > deadline
            if late or self._ending or not process.alive:
                process.kill()
                why = f"did not answer within {seconds:.0f} s" if late else "ended while starting"
                raise ServerError(f"{self.name} {why}; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Stop gracefully, a suspended server too; harmless if it is down."""
        with self._turn:
            if self._process is not None and self._process.alive:
                self._process.resume()
                self._process.send(self.stop_signal)
                if not self._process.wait(self.stop_seconds):
                    self._process.kill()
            self._process = None

    def kill(self) -> None:
        """SIGKILL all of it at once, as a machine does that loses its power; harmless if it is down.

        A `start` in another thread gives up.
        """
        self.give_up()
        if self._process is not None:
            self._process.kill()
        with self._turn:
            if self._process is not None:
                self._process.kill()
            self._process = None

    def give_up(self) -> None:
        """Let a `start` in another thread end with an error, soon."""
        self._ending = True

    def restart(self) -> Self:
        """Stop gracefully, then start again."""
        with self._turn:
            self.stop()
            return self.start()

    def suspend(self) -> None:
        """SIGSTOP all of it: connections stay open, nothing answers."""
        self._alive().suspend()

    def resume(self) -> None:
        """Let a suspended server go on."""
        self._alive().resume()

    def _alive(self) -> KeptProcess:
        if self._process is None or not self._process.alive:
            raise ServerError(f"{self.name} in {self.folder} is not running")
        return self._process

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last *lines* of what the server wrote."""
        try:
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(it has not written anything)"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def start_all(*servers: Server) -> None:
    """Start *servers* at the same time; if one fails, none is left running."""
    with ThreadPoolExecutor(len(servers)) as pool:
        try:
            for start in as_completed([pool.submit(server.start) for server in servers]):
                start.result()
        except BaseException:
            for server in servers:
                server.give_up()
            for server in servers:
                server.kill()
            raise
