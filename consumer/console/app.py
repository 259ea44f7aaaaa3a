"""The console: which address shows what, and the overview. It only reads, and never holds up the worker's loop."""

import asyncio
from collections.abc import Sequence
from time import monotonic, time

import structlog
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from consumer.amqp.connection import BrokerConnection
from consumer.console.alerts import troubles_of
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
# Seconds that closing may take: less than what a stopping worker keeps for it.
_CLOSING_SECONDS = 0.5


class Console:
    """The pages of one worker. Nothing is connected until somebody looks, and not for long after."""

    def __init__(
        self, *, database_url: Url, amqp_url: Url, metrics: Metrics, health: Health, parked: ParkedLately
    ) -> None:
        self._engine = create_console_engine(database_url)
        broker = BrokerConnection(amqp_url, name="closeout console")
        self._overview = Overview(engine=self._engine, broker=broker, metrics=metrics, health=health, parked=parked)
        self._rendering = Rendering()
        self._runs = RunPages(engine=self._engine, parked=parked, rendering=self._rendering, seen=self._seen)
        self._files = StaticFiles()
        self._live = ""
        self._live_until = float("-inf")
        self._one_renders = asyncio.Lock()
        self._seen_at: float | None = None

    def routes(self) -> Sequence[Route]:
        """Return the addresses; each answers GET and HEAD, anything else is 405."""
        return (
            Route("/", self.show_overview),
            Route("/live", self.show_live),
            Route("/runs", self._runs.search),
            Route("/runs/{tenant_id}/{run_id}", self._runs.show),
            Route("/static/{name}", self._files.answer),
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Look at the worker's counters every two seconds until *stopping*; let go of what nobody needs any more."""
        while not stopping.is_set():
            try:
                self._overview.history.sample(time())
                if self._seen_at is not None and monotonic() > self._seen_at + _IDLE_SECONDS:
                    await self.close()
            except Exception:  # a bug in the console must not end the worker
                log.exception("the console's history has a gap")
            try:
                # On the same beat in every worker, so that columns of time hold the same number of looks.
                await asyncio.wait_for(stopping.wait(), SAMPLE_SECONDS - time() % SAMPLE_SECONDS)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Close the sessions and the connection; the next viewer opens others. Never raises for a server's sake."""
        self._seen_at = None
        self._runs.forget()
        try:
            async with asyncio.timeout(2 * _CLOSING_SECONDS):
                await self._overview.release(_CLOSING_SECONDS)
                await self._engine.dispose()
        except (TimeoutError, OSError) as error:
            log.info("the console's connections were left to the system", error=str(error))

    async def show_overview(self, _request: Request) -> Response:
        """Answer ``/``: the flow as a whole."""
        live = Markup(await self._live_part())  # noqa: S704 - it was escaped when it was rendered
        return await self._rendering.page("overview.html", live="/live", content=live)

    async def show_live(self, _request: Request) -> Response:
        """Answer ``/live``: the part of ``/`` that changes."""
        return html(await self._live_part())

    async def not_found(self, request: Request, _error: Exception) -> Response:
        """Answer an address that is none."""
        words = f"There is nothing at {request.url.path[:200]}. The console is at /, a run at /runs/tenant_id/run_id."
        return await self._rendering.page("message.html", status=404, title="No such page", lines=[words])

    async def _live_part(self) -> str:
        """Return the overview's changing part, made once a second at most however many look."""
        self._seen()
        async with self._one_renders:
            if monotonic() >= self._live_until:
                picture = await self._overview.read()
                troubles = troubles_of(picture)
                self._live = await self._rendering.text("live.html", picture=picture, troubles=troubles)
                self._live_until = monotonic() + FRESH_SECONDS
        return self._live

    def _seen(self) -> None:
        self._seen_at = monotonic()
