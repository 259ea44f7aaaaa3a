"""The worker's HTTP server, in the worker's event loop: /metrics, /livez, /readyz and the console."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from consumer.console.app import Console
from consumer.console.responses import SecurityHeaders
from consumer.health import Health
from consumer.http_limits import BACKLOG, IDLE_SECONDS, BoundedProtocol
from consumer.metrics import Metrics


def application(metrics: Metrics, health: Health, console: Console) -> ASGIApp:
    """Return the ASGI application."""

    async def livez(_request: Request) -> Response:
        # Served by the event loop itself: a blocked loop does not respond.
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        state = {"ready": health.is_ready, "reason": health.reason, "since": health.since.isoformat()}
        if warning := health.warning:
            state["warning"] = warning
        return JSONResponse(state, status_code=200 if health.is_ready else 503)

    async def scrape(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # In a thread: a large scrape would block the loop for 100 ms.
        body = await asyncio.to_thread(encode, metrics.registry)
        return Response(body, headers={"content-type": content_type})

    app = Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", scrape),
            *console.routes(),
        ],
        exception_handlers={404: console.not_found},
    )
    return SecurityHeaders(app)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; the worker handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpService:
    """Listens from construction on, so that a port in use is an error before anything is consumed."""

    def __init__(self, app: ASGIApp, *, host: str, port: int) -> None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(f"HTTP_HOST, HTTP_PORT: cannot listen on {host}:{port}: {why}") from None
        self.port: int = self._socket.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_SECONDS,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )

    async def run(self) -> None:
        """Serve until :meth:`stop`."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Finish open requests, then return from :meth:`run`."""
        self._server.should_exit = True
