"""One plain AMQP connection, re-created after each loss.

Not aio-pika's robust mode: it restores through weak references and may come back without its consumer (aio-pika #231,
#536, #563, #626). Here nothing is restored: a lost connection is discarded and a new one is built.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import aio_pika
import structlog
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelInvalidStateError,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from yarl import URL

from config.settings import SettingsError
from consumer.amqp.channel import Channel, open_channel
from consumer.amqp.lenient_codec import read_leniently
from consumer.errors import UnavailableError, links, one_line
from consumer.tls_errors import CUT_SHORT, HandshakeError, Server, explain

log = structlog.get_logger(__name__)

# Seconds. A dead connection is detected after 3 x (heartbeat + 1): 33 s; with aiormq's default of 60, 183 s.
HEARTBEAT_SECONDS = 10
# Seconds to connect and to open a channel. A booting broker accepts the connection and does not respond.
OPEN_TIMEOUT_SECONDS = 10.0
# Seconds between two attempts to connect, shared by all callers.
RECONNECT_PAUSE_SECONDS = 1.0

_PORTS = {"amqp": 5672, "amqps": 5671}

# ChannelInvalidStateError is not an AMQPError: the channel closed during a call.
BROKER_ERRORS = (AMQPError, ChannelInvalidStateError, OSError, TimeoutError, asyncio.IncompleteReadError)

# An amqp:// or amqps:// URL, or a function that returns the current one.
Url = str | Callable[[], str]


class BrokerConnection:
    """A connection to RabbitMQ, opened by the first :meth:`channel` and re-created after a loss."""

    def __init__(self, url: Url, *, name: str) -> None:
        """Use *url*, or call it for each connection, because its password may change."""
        read_leniently()  # one message with an unreadable property must not break every connection
        self._url = url
        self._name = name
        # The user of the current or next connection.
        self.user = self._current_url().user
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._lock = asyncio.Lock()
        self._failed_at = float("-inf")
        self._failure = ""

    async def channel(self, *, confirms: bool) -> Channel:
        """Open a channel, connecting first if needed; raise :class:`UnavailableError` if the broker is unavailable."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                transport = (await self._connected()).transport
                if transport is None:
                    raise ConnectionError("the connection was closed")
                return await open_channel(transport.connection, confirms=confirms)
        except (*BROKER_ERRORS, RuntimeError, StopAsyncIteration) as error:
            # aiormq raises RuntimeError and StopAsyncIteration for connections that close during the call.
            raise UnavailableError(f"RabbitMQ is not available: {one_line(error)}") from error

    async def _connected(self) -> aio_pika.abc.AbstractConnection:
        async with self._lock:
            if self._connection is not None and self.is_open:
                return self._connection
            if time.monotonic() < self._failed_at + RECONNECT_PAUSE_SECONDS:
                raise UnavailableError(f"RabbitMQ is not available: {self._failure}")
            await self.close()  # aio-pika counts a lost connection as open until it is closed
            url = self._current_url()
            # Reads the TLS files named in the URL, so that they can be renewed.
            made = aio_pika.Connection(
                url.update_query(heartbeat=HEARTBEAT_SECONDS), client_properties={"connection_name": self._name}
            )
            try:
                await made.connect()
            except BaseException as error:
                await made.close()
                described = _describe(error, url)
                self._failed_at = time.monotonic()
                self._failure = one_line(described)
                if described is error:
                    raise
                raise described from error
            self._connection, self.user = made, url.user
            return made

    def _current_url(self) -> URL:
        try:
            return URL(self._url if isinstance(self._url, str) else self._url())
        except SettingsError as error:
            raise ConnectionError(one_line(error)) from error

    async def is_blocked(self) -> bool:
        """Return whether a memory or disk alarm of the broker blocks this connection."""
        connection = self._connection
        if connection is None or connection.transport is None or not self.is_open:
            return False
        try:
            async with asyncio.timeout(0):  # ready() returns immediately unless the connection is blocked
                await connection.transport.ready()
        except TimeoutError:
            return True
        return False

    @property
    def is_open(self) -> bool:
        """Return whether the connection is open; a dead one counts as open until heartbeats are missed."""
        # aio-pika's is_closed stays false when its underlying aiormq connection is lost.
        connection = self._connection
        if connection is None or connection.is_closed or connection.transport is None:
            return False
        return not connection.transport.connection.is_closed

    async def close(self) -> None:
        """Close the connection within a few seconds; never raises for an unavailable broker."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*BROKER_ERRORS):
                async with asyncio.timeout(3):
                    await connection.close()


def _describe(error: BaseException, url: URL) -> BaseException:
    """Return *error*, or a more specific error that names the user, the certificate or the port."""
    if not isinstance(error, Exception) or url.host is None:
        return error
    if isinstance(error, AuthenticationError | ProbableAuthenticationError):
        return ConnectionError(f"{one_line(error)} (user {url.user})")
    tls = url.scheme == "amqps"
    port = url.port or _PORTS[url.scheme]
    server = Server(kind="rabbitmq", host=url.host, port=port, tls=tls, given=dict(url.query))
    if not tls and any(isinstance(link, (*CUT_SHORT, InvalidFrameError)) for link in links(error)):
        remedy = "use amqps:// in AMQP_URL if this port expects TLS; otherwise see the broker's log"
        return HandshakeError(server, f"{server} closed the connection before login", remedy)
    return explain(error, server) or error
