"""The console's routes and its overview. It only reads, and never blocks the worker's event loop."""

import asyncio
from collections.abc import Sequence
from time import monotonic, time

import structlog
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from consumer.amqp.connection import BrokerConnection
from consumer.console.alerts import alerts_of
from consumer.console.history import SAMPLE_SECONDS
from consumer.console.overview_data import Overview
from consumer.console.queries import create_console_engine
from consumer.console.recently_parked import ParkedLately
from consumer.console.rendering import Rendering, html
from consumer.console.responses import StaticFiles
from consumer.console.run_pages import RunPages
from consumer.console.shared_reads import FRESH_SECONDS
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.postgres.engine import Url

log = structlog.get_logger(__name__)

# Seconds without a viewer after which the sessions and the connection are closed.
_IDLE_SECONDS = 60.0
# Seconds for closing: less than a stopping worker reserves for it.
_CLOSING_SECONDS = 0.5


class Console:
    """The pages of one worker. It connects when a page is opened, and disconnects soon after the last one."""

    def __init__(
        self,
        *,
        database_url: Url,
        amqp_url: Url,
        metrics: Metrics,
        health: Health,
        parked: ParkedLately,
        intake_queues: int = 1,
    ) -> None:
        self._engine = create_console_engine(database_url)
        broker = BrokerConnection(amqp_url, name="closeout console")
        self._overview = Overview(
            engine=self._engine,
            broker=broker,
            metrics=metrics,
            health=health,
            parked=parked,
            intake_queues=intake_queues,
        )
        self._rendering = Rendering()
        self._runs = RunPages(engine=self._engine, parked=parked, rendering=self._rendering, seen=self._seen)
        self._files = StaticFiles()
        self._live = ""
        self._live_until = float("-inf")
        self._one_renders = asyncio.Lock()
        self._seen_at: float | None = None

    def routes(self) -> Sequence[Route]:
        """Return the routes; each accepts GET and HEAD, other methods get 405."""
        return (
            Route("/", self.show_overview),
            Route("/live", self.show_live),
            Route("/runs", self._runs.search),
            Route("/runs/{tenant_id}/{run_id:path}", self._runs.show),
            Route("/static/{name}", self._files.answer),
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Sample the worker's counters every two seconds until *stopping*; close unused connections."""
        while not stopping.is_set():
            try:
                self._overview.history.sample(time())
                if self._seen_at is not None and monotonic() > self._seen_at + _IDLE_SECONDS:
                    await self.close()
            except Exception:  # a bug in the console must not end the worker
                log.exception("console metrics sampling failed")
            try:
                # Aligned to the clock, so that all columns have the same number of samples.
                await asyncio.wait_for(stopping.wait(), SAMPLE_SECONDS - time() % SAMPLE_SECONDS)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Close the sessions and the connection; the next viewer opens new ones. Never raises for server errors."""
        self._seen_at = None
        self._runs.forget()
        try:
            async with asyncio.timeout(2 * _CLOSING_SECONDS):
                await self._overview.release(_CLOSING_SECONDS)
                await self._engine.dispose()
        except (TimeoutError, OSError) as error:
            log.info("console connections not closed in time", error=str(error))

    async def show_overview(self, _request: Request) -> Response:
        """Handle ``/``: the overview."""
        live = Markup(await self._live_part())  # noqa: S704 - it was escaped when it was rendered
        return await self._rendering.page("overview.html", live="/live", content=live)

    async def show_live(self, _request: Request) -> Response:
        """Handle ``/live``: the refreshed part of ``/``."""
        return html(await self._live_part())

    async def not_found(self, request: Request, _error: Exception) -> Response:
        """Handle an unknown address."""
        text = f"There is no page at {request.url.path[:200]}. The console is at /, a run at /runs/tenant_id/run_id."
        return await self._rendering.page("message.html", status=404, title="No such page", lines=[text])

    async def _live_part(self) -> str:
        """Return the refreshed part of the overview, rendered at most once per second for all viewers."""
        self._seen()
        async with self._one_renders:
            if monotonic() >= self._live_until:
                picture = await self._overview.read()
                alerts = alerts_of(picture)
                self._live = await self._rendering.text("live.html", picture=picture, alerts=alerts)
                self._live_until = monotonic() + FRESH_SECONDS
        return self._live

    def _seen(self) -> None:
        self._seen_at = monotonic()
