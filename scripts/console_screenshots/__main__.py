"""The flow: servers, a worker, traffic, pictures of the console and of the dashboard's queries over it."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chromium import ARGUMENTS, find_chromium
from demo_run.show import Demonstration
from PIL import Image
from playwright.async_api import Browser, async_playwright
from servers.binaries.debian_program import PROMETHEUS
from servers.process import ServerError
from servers.prometheus import PrometheusServer
from servers.service_pair import end_on_signals, running_pair

from console_screenshots import drawing
from console_screenshots.dashboard import Panel, answered
from console_screenshots.traffic import Traffic
from consumer.amqp.connection import BrokerConnection
from consumer.postgres.engine import create_engine

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "scripts/demo_run/policies.yaml"
WIDE, NARROW = {"width": 1200, "height": 800}, {"width": 360, "height": 1_400}
# Seconds until the page of the last run is there.
PATIENCE = 15.0


async def picture(show: Demonstration, prometheus: PrometheusServer, folder: Path, seconds: float) -> list[Path]:
    """Publish for *seconds* and write the pictures below *folder*; return them."""
    engine = create_engine(show.environment["DATABASE_URL"], pool_size=1)
    broker = BrokerConnection(show.environment["AMQP_URL"], name="screenshots")
    traffic = Traffic(broker, engine, seed=7)
    try:
        await traffic.prepare()
        began = time.time()
        flowing = asyncio.create_task(traffic.flow(seconds))
        await asyncio.sleep(seconds * 0.9)
        address = f"http://127.0.0.1:{show.port}"
        async with _browser() as browser:
            written = await _take(browser, f"{address}/", folder, "overview")
            await flowing
            await traffic.end()
            run = f"{address}/runs/{traffic.shown['tenant_id']}/{traffic.shown['run_id']}"
            written += await _take(browser, run, folder, "run", await_text="All confirmed")
            # From the fifth scrape on: before it the rates are not there.
            panels = answered(prometheus, began + 5, time.time())
            return written + await _draw(browser, panels, folder)
    finally:
        await broker.close()
        await engine.dispose()


@asynccontextmanager
async def _browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield browser
        await browser.close()


async def _take(browser: Browser, address: str, folder: Path, name: str, *, await_text: str = "Live") -> list[Path]:
    written = []
    for width, size in (("desktop", WIDE), ("phone", NARROW)):
        for scheme in ("light", "dark"):
            options: dict[str, Any] = {"viewport": size, "color_scheme": scheme, "reduced_motion": "reduce"}
            page = await browser.new_page(**options)
            await page.goto(address)
            await page.get_by_text(await_text).first.wait_for(timeout=PATIENCE * 1_000)
            file = folder / f"{name}-{width}-{scheme}.png"
            # Of a long page on a phone the first screens; the wide ones whole.
            await page.screenshot(path=file, full_page=width == "desktop")
            await page.close()
            _make_small(file)
            written.append(file)
    return written


async def _draw(browser: Browser, panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Draw the dashboard in two pictures: how runs flow, and below that row what goes wrong and the workers."""
    (cut,) = (panel.place["y"] for panel in panels if panel.title == "Failures")
    halves = {
        "dashboard": [panel for panel in panels if panel.place["y"] < cut],
        "dashboard-trouble": [panel for panel in panels if panel.place["y"] >= cut],
    }
    written = []
    for name, half in halves.items():
        page = await browser.new_page(viewport={"width": drawing.WIDTH, "height": 800})
        await page.set_content(drawing.page(half))
        written.append(folder / f"{name}.png")
        await page.locator("#dashboard").screenshot(path=written[-1])
        await page.close()
        _make_small(written[-1])
    return written


def _make_small(file: Path) -> None:
    """Keep 256 colours, the rare ones too: a third of the bytes, and no difference that an eye finds."""
    with Image.open(file) as image:
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            file, optimize=True
        )


def main() -> int:
    """Parse the command line and take the pictures."""
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "deploy/screenshots", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=90.0, help="of traffic before the pictures (%(default)s)")
    parser.add_argument("--rabbitmq", choices=("3.10", "4"), default="4", help="which RabbitMQ (default: 4)")
    options = parser.parse_args()
    end_on_signals()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        find_chromium()
        PROMETHEUS.find()
        with tempfile.TemporaryDirectory(prefix="closeout-screenshots-", ignore_cleanup_errors=True) as name:
            work = Path(name)
            work.chmod(0o755)  # PostgreSQL may have to run as another user
            with running_pair(work / "servers", options.rabbitmq, management=False) as (*_, environment):
                show = Demonstration(environment, work)
                for words in (("migrate",), ("topology",), ("policies", "apply", str(POLICIES))):
                    show.closeout(*words)
                worker = show.start_worker()
                targets = {"closeout": [f"127.0.0.1:{show.port}"]}
                try:
                    show.await_ready()
                    print(f"{options.seconds:g} s of traffic, then the pictures", file=sys.stderr, flush=True)
                    with PrometheusServer(work / "prometheus", targets=targets) as prometheus:
                        written = asyncio.run(picture(show, prometheus, options.folder.absolute(), options.seconds))
                finally:
                    worker.terminate()
                    worker.wait(30)
    except ServerError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return 1
    for file in written:
        print(f"{file}  {file.stat().st_size / 1024:,.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
