"""Bounds on the HTTP server's connections, so that clients cannot take the file descriptors that the worker needs."""

import asyncio
from time import monotonic
from typing import cast

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 100
# Seconds within which a request's head must arrive, counted from the connection or from the request's first byte.
HEAD_SECONDS = 10.0
# Seconds for which a connection without a request stays open after a response.
IDLE_SECONDS = 5
# Connections that the kernel holds, and that the event loop accepts at once, before any of them is counted.
BACKLOG = 64
# One log line per minute while connections are refused.
_REPORT_EVERY_SECONDS = 60.0


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with at most ``CONNECTIONS_MAX`` connections and a limit on the time of a head.

    A further connection replaces the oldest one without a request in progress, so that a scrape or a probe gets in;
    if every connection has one, it is closed.
    """

    _late: asyncio.TimerHandle | None = None
    _reported_at = float("-inf")
    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and make room for it."""
        super().connection_made(transport)
        self.since = monotonic()
        self._expect_head()
        if len(self.connections) > CONNECTIONS_MAX:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Start the time of a head at its first byte, and end it once the head is complete."""
        if self._late is None and not self.has_request:
            self._expect_head()
        super().data_received(data)
        if self.has_request:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def has_request(self) -> bool:
        """Return whether a request's head is complete and its response is not."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # null until the first request
        return cycle is not None and not cycle.response_complete

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self.drop)

    def _stop_timer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def drop(self) -> None:
        """End the connection at once: a client that reads nothing would keep a closing one open."""
        self._late = None
        self.connections.discard(self)
        self.transport.abort()

    def _make_room(self) -> None:
        others = (other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self)
        idle = [other for other in others if not other.has_request]
        victim = min(idle, key=lambda other: other.since, default=self)
        victim.drop()
        if monotonic() > BoundedProtocol._reported_at + _REPORT_EVERY_SECONDS:
            BoundedProtocol._reported_at = monotonic()
            log.warning("HTTP connections at the limit; idle ones are closed", limit=CONNECTIONS_MAX)
