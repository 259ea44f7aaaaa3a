"""A line between a worker and a server that a test can stall, cut and refuse."""

import asyncio
import contextlib
import socket
import struct

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: RST in place of FIN


class Line:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client, self.server = client, server
        # As the server knows it: pg_stat_activity.client_port.
        self.port: int = server.get_extra_info("sockname")[1]
        self.flowing = asyncio.Event()
        # The next thing the server says is lost with the line: it has done what it was told, and nobody hears of it.
        self.doomed = False
        self.answers_left, self.reset = -1, True
        # With it, the client is not told that the server is gone; that it is sets the other.
        self.silent_end, self.ended = False, asyncio.Event()

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Carry bytes until an end closes, only while the line flows."""
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await self.flowing.wait()
                if sink is self.client:  # what is written goes out before the next is looked at
                    if self.doomed or self.answers_left == 0:
                        break
                    self.answers_left -= 1
                sink.write(data)
                await sink.drain()
        if self.doomed or self.answers_left == 0:
            self.cut() if self.reset else self.client.close()
        self.ended.set()
        if not self.silent_end:
            sink.close()

    def cut(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):  # closed already
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            end.transport.abort()


class Proxy:
    """Passes bytes on to the first of *ports* that listens, until told otherwise; its own port stays the same."""

    def __init__(self, *ports: int) -> None:
        self.targets, self.port = list(ports), 0
        self.lines: set[Line] = set()
        # How many answers of the server each coming line lets through before it breaks, and whether by a reset.
        self.breaks: list[tuple[int, bool]] = []
        self._stalled = False
        self._listener: asyncio.Server | None = None

    async def accept(self) -> "Proxy":
        """Take connections, from the start or again after :meth:`refuse`."""
        if self._listener is not None:
            return self
        # A small limit, so that a stalled line stops being read.
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
        line = Line(writer, to_server)
        if not self._stalled:
            line.flowing.set()
        if self.breaks:
            line.answers_left, line.reset = self.breaks.pop(0)
        self.lines.add(line)
        try:
            await asyncio.gather(line.pump(reader, to_server), line.pump(from_server, writer))
        finally:
            self.lines.discard(line)

    def stall(self, *, new_lines_too: bool = True) -> None:
        """Carry nothing any more in either direction; nobody is told."""
        self._stalled = new_lines_too
        for line in self.lines:
            line.flowing.clear()

    def flow(self) -> None:
        """End a stall: what was written meanwhile arrives."""
        self._stalled = False
        for line in self.lines:
            line.flowing.set()

    def cut(self) -> None:
        """Reset every line."""
        for line in list(self.lines):
            line.cut()

    def refuse(self) -> None:
        """Take no new connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        self.refuse()
        self.cut()
        self.flow()
