"""A TCP proxy between a worker and a server that can stall, reset and refuse connections."""

import asyncio
import contextlib
import socket
import struct

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: RST in place of FIN


class ProxiedConnection:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client, self.server = client, server
        # The client's port at the server: pg_stat_activity.client_port.
        self.port: int = server.get_extra_info("sockname")[1]
        self.flowing = asyncio.Event()
        # The server's next response is lost with the connection: the server has executed the request, and the client
        # receives no result.
        self.drop_next_response = False
        self.responses_left, self.reset = -1, True
        # Whether the client does not see that the server closed the connection; set once it has.
        self.hide_server_close, self.server_closed = False, asyncio.Event()

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Forward bytes until an end closes, and only while the connection flows."""
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await self.flowing.wait()
                if sink is self.client:  # each chunk is sent before the next one is read
                    if self.drop_next_response or self.responses_left == 0:
                        break
                    self.responses_left -= 1
                sink.write(data)
                await sink.drain()
        if self.drop_next_response or self.responses_left == 0:
            self.cut() if self.reset else self.client.close()
        self.server_closed.set()
        if not self.hide_server_close:
            sink.close()

    def cut(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):  # closed already
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            end.transport.abort()


class Proxy:
    """Forwards connections to the first of *ports* that listens; its own port stays the same."""

    def __init__(self, *ports: int) -> None:
        self.targets, self.port = list(ports), 0
        self.connections: set[ProxiedConnection] = set()
        # For each coming connection: the number of responses before it breaks, and whether by a reset.
        self.breaks: list[tuple[int, bool]] = []
        self._stalled = False
        self._listener: asyncio.Server | None = None

    async def accept(self) -> "Proxy":
        """Accept connections, from the start or again after :meth:`refuse`."""
        if self._listener is not None:
            return self
        # A small limit, so that a stalled connection stops being read.
        self._listener = await asyncio.start_server(self._carry, "127.0.0.1", self.port, limit=4096)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for target in self.targets:
            with contextlib.suppress(OSError):
                from_server, to_server = await asyncio.open_connection("127.0.0.1", target, limit=4096)
                break
        else:
            writer.transport.abort()
            return
        connection = ProxiedConnection(writer, to_server)
        if not self._stalled:
            connection.flowing.set()
        if self.breaks:
            connection.responses_left, connection.reset = self.breaks.pop(0)
        self.connections.add(connection)
        try:
            await asyncio.gather(connection.pump(reader, to_server), connection.pump(from_server, writer))
        finally:
            self.connections.discard(connection)

    def stall(self, *, new_connections_too: bool = True) -> None:
        """Forward nothing in either direction, without closing anything."""
        self._stalled = new_connections_too
        for connection in self.connections:
            connection.flowing.clear()

    def flow(self) -> None:
        """End a stall: bytes written meanwhile arrive."""
        self._stalled = False
        for connection in self.connections:
            connection.flowing.set()

    def cut(self) -> None:
        """Reset every connection."""
        for connection in list(self.connections):
            connection.cut()

    def refuse(self) -> None:
        """Accept no new connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        self.refuse()
        self.cut()
        self.flow()
