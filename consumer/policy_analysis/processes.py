"""Evaluates policies in several processes, each with its own connection."""

import asyncio
import gc
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.errors import UnavailableError, one_line
from consumer.policy_analysis.evaluation import Evaluation, Results
from consumer.postgres.engine import DATABASE_ERRORS, create_engine
from consumer.runs.pages import Span
from consumer.runs.stored import reading

# Spans per process that are read ahead.
_AHEAD = 2


class Processes:
    """One process for each core that this one may use; started when there is something to evaluate."""

    def __init__(self, url: str, number: int | None = None) -> None:
        """Start nothing yet; the processes will connect to the database at *url*."""
        self.number = number or len(os.sched_getaffinity(0))
        self._url = url

    async def evaluate(self, evaluation: Evaluation, spans: AsyncIterator[Span]) -> AsyncGenerator[Results, None]:
        """Yield the results of *evaluation* on each of *spans*, in their order; the processes end with the iterator.

        Raises :class:`UnavailableError` if the database is unavailable to a process, or a process is killed.
        """
        loop = asyncio.get_running_loop()
        pool = ProcessPoolExecutor(self.number, get_context("spawn"), _start, (self._url, evaluation))
        pending: deque[asyncio.Future[Results]] = deque()
        try:
            async for span in spans:
                with _signals_blocked():  # inherited by the process that this may start
                    pending.append(loop.run_in_executor(pool, _evaluate, span))
                if len(pending) > _AHEAD * self.number:
                    yield await pending.popleft()
            while pending:
                yield await pending.popleft()
        except BrokenProcessPool as error:
            raise UnavailableError("a process that evaluates policies was killed: is there enough memory?") from error
        finally:
            for future in pending:
                future.cancel()
            for process in active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """The state of a process: its evaluation, its event loop and its connection."""

    def __init__(self, url: str, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._runner = asyncio.Runner()
        self._engine = create_engine(url, pool_size=1)
        self._reading = reading(self._engine)
        self._conn: AsyncConnection | None = None

    def evaluate(self, span: Span) -> Results:
        try:
            return self._runner.run(self._of_span(span))
        except DATABASE_ERRORS as error:  # not all of them can be sent to another process
            raise UnavailableError(f"PostgreSQL: {one_line(error)}") from None
        finally:
            gc.collect()

    async def _of_span(self, span: Span) -> Results:
        if self._conn is None:
            self._conn = await self._reading.__aenter__()
        return await self._evaluation.of_span(self._conn, span)


_process: _Process


def _start(url: str, evaluation: Evaluation) -> None:
    global _process  # noqa: PLW0603 - a pool gives its functions no other place for a process's state
    _process = _Process(url, evaluation)
    # Rows form no cycles, and looking for some takes a tenth of the time; it is done after each span.
    gc.freeze()
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches every process of the terminal; the command reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
    os._exit(1)


def _evaluate(span: Span) -> Results:
    return _process.evaluate(span)
