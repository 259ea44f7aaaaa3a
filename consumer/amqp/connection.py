"""One plain AMQP connection that is made anew, from nothing, as often as needed.

Not aio-pika's robust mode: after a lost connection it restores through weak references and may come back without its
consumer (aio-pika #231, #536, #563, #626). Here nothing is restored; what broke is thrown away and built again.
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
from consumer.tls_errors import CUT_SHORT, HandshakeError, Server, explained, speaks_tls

log = structlog.get_logger(__name__)

# Seconds. A dead line is noticed after 3 x (heartbeat + 1): 33 s, where the client's default of 60 takes three minutes.
HEARTBEAT_SECONDS = 10
# Seconds to connect and to open a channel. A broker that is still booting accepts and stays silent.
OPEN_TIMEOUT_SECONDS = 10.0
# Seconds between two attempts to connect, so that many callers cannot make a storm of them.
RECONNECT_PAUSE_SECONDS = 1.0

_PORTS = {"amqp": 5672, "amqps": 5671}

# ChannelInvalidStateError is no AMQPError: the channel closed under a call.
BROKER_ERRORS = (AMQPError, ChannelInvalidStateError, OSError, TimeoutError, asyncio.IncompleteReadError)

# amqp:// or amqps://, or what returns it as it is now.
Url = str | Callable[[], str]


class BrokerConnection:
    """A connection to RabbitMQ, opened by the first :meth:`channel` and again after it was lost."""

    def __init__(self, url: Url, *, name: str) -> None:
        """Take *url*, or what returns it as it is now: asked for each connection, for its password may change."""
        read_leniently()  # one message with an unreadable property must not break every connection
        self._url = url
        self._name = name
        # Of the connection there is, or will be.
        self.user = self._current_url().user
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._lock = asyncio.Lock()
        self._failed_at = float("-inf")
        self._failure = ""

    async def channel(self, *, confirms: bool) -> Channel:
        """Open a channel, connecting first where need be; raise :class:`UnavailableError` if the broker is away."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                transport = (await self._connected()).transport
                if transport is None:
                    raise ConnectionError("the connection was closed")
                return await open_channel(transport.connection, confirms=confirms)
        except (*BROKER_ERRORS, RuntimeError, StopAsyncIteration) as error:
            # aiormq's words for a connection that closed a moment ago, and for one that ends before its first answer.
            raise UnavailableError(f"RabbitMQ is not available: {one_line(error)}") from error

    async def _connected(self) -> aio_pika.abc.AbstractConnection:
        async with self._lock:
            if self._connection is not None and self.is_open:
                return self._connection
            if time.monotonic() < self._failed_at + RECONNECT_PAUSE_SECONDS:
                raise UnavailableError(f"RabbitMQ is not available: {self._failure}")
            await self.close()  # what is lost counts as open to the client until somebody says so
            url = self._current_url()
            # It reads the files that the URL names for TLS, so they can be renewed as well.
            made = aio_pika.Connection(
                url.update_query(heartbeat=HEARTBEAT_SECONDS), client_properties={"connection_name": self._name}
            )
            try:
                await made.connect()
            except BaseException as error:
                await made.close()
                told = await _in_words(error, url)
                self._failed_at = time.monotonic()
                self._failure = one_line(told)
                if told is error:
                    raise
                raise told from error
            self._connection, self.user = made, url.user
            return made

    def _current_url(self) -> URL:
        try:
            return URL(self._url if isinstance(self._url, str) else self._url())
        except SettingsError as error:
            raise ConnectionError(one_line(error)) from error

    async def is_blocked(self) -> bool:
        """Say whether the broker, in a memory or disk alarm, has stopped reading what is published here."""
        connection = self._connection
        if connection is None or connection.transport is None or not self.is_open:
            return False
        try:
            async with asyncio.timeout(0):  # ready() returns without a pause unless the connection is blocked
                await connection.transport.ready()
        except TimeoutError:
            return True
        return False

    @property
    def is_open(self) -> bool:
        """Say whether there is a connection; a dead line counts as one until its heartbeat is missed."""
        # aio-pika's own is_closed stays false when aiormq's connection, which it stands on, was lost.
        connection = self._connection
        if connection is None or connection.is_closed or connection.transport is None:
            return False
        return not connection.transport.connection.is_closed

    async def close(self) -> None:
        """Close the connection, at most a few seconds long; never raises for a broker that is gone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*BROKER_ERRORS):
                async with asyncio.timeout(3):
                    await connection.close()


async def _in_words(error: BaseException, url: URL) -> BaseException:
    """Return *error*, or one that says more: whose password is wrong, which certificate, which port."""
    if not isinstance(error, Exception) or url.host is None:
        return error
    server = Server(
        kind="rabbitmq",
        host=url.host,
        port=url.port or _PORTS[url.scheme],
        tls=url.scheme == "amqps",
        given=dict(url.query),
    )
    if isinstance(error, AuthenticationError | ProbableAuthenticationError):
        return ConnectionError(f"{one_line(error)} (user {url.user})")
    if told := await explained(error, server):
        return told
    cut = any(isinstance(link, (*CUT_SHORT, InvalidFrameError)) for link in links(error))
    if cut and not server.tls and await speaks_tls(server):
        return HandshakeError(f"{server} speaks TLS, and amqp:// is without", "write amqps:// in AMQP_URL")
    return error
