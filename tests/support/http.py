"""A minimal HTTP client: the request target is sent unmodified, and every connection is closed."""

import asyncio
from typing import NamedTuple

# Seconds. Ends a test whose server hangs; a busy machine must not exceed it.
TIMEOUT = 30.0


class Response(NamedTuple):
    """A status, headers by their lower-case names, and the decoded body."""

    status: int
    headers: dict[str, str]
    body: str


async def request(
    port: int, target: str, *, method: str = "GET", headers: str = "", within: float = TIMEOUT
) -> Response:
    """Send a request to *port* of this machine; *headers* are complete header lines. Raises TimeoutError."""
    async with asyncio.timeout(within):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
    status, *lines = head.split("\r\n")
    if not status:
        raise ConnectionResetError("the server closed the connection without a response")
    found = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Response(int(status.split()[1]), found, body)


def request_blocking(port: int, target: str, *, headers: str = "") -> Response:
    """Like :func:`request`, for a test without an event loop."""
    return asyncio.run(request(port, target, headers=headers))


async def ready(port: int) -> bool:
    """Return whether the worker at *port* reports that it is ready."""
    return (await request(port, "/readyz")).status == 200
