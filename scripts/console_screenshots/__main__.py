"""Take screenshots of the console's pages while a worker processes generated traffic."""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chromium import ARGUMENTS, find_chromium
from demo_run.setup import set_up
from demo_run.show import Demonstration
from PIL import Image
from playwright.async_api import Browser, async_playwright
from servers.process import ServerError
from servers.service_pair import end_on_signals, running_pair

from console_screenshots.traffic import Traffic
from consumer.amqp.connection import BrokerConnection
from consumer.postgres.engine import create_engine

ROOT = Path(__file__).parents[2]
WIDE, NARROW = {"width": 1200, "height": 800}, {"width": 360, "height": 1_400}
PAGE_SECONDS = 15.0  # until a page shows its data


async def take_all(demo: Demonstration, folder: Path, seconds: float) -> list[Path]:
    """Publish for *seconds*, write the screenshots to *folder* and return their files."""
    engine = create_engine(demo.environment["DATABASE_URL"], pool_size=1)
    broker = BrokerConnection(demo.environment["AMQP_URL"], name="screenshots")
    traffic = Traffic(broker, engine, seed=7)
    try:
        await traffic.prepare()
        publishing = asyncio.create_task(traffic.publish(seconds))
        await asyncio.sleep(seconds * 0.9)
        address = f"http://127.0.0.1:{demo.port}"
        async with _browser() as browser:
            written = await _take(browser, f"{address}/", folder, "overview", await_text="Live")
            await publishing
            run = await traffic.publish_detailed_run()
            page = f"{address}/runs/{run['tenant_id']}/{run['run_id']}"
            return written + await _take(browser, page, folder, "run", await_text="All confirmed")
    finally:
        await broker.close()
        await engine.dispose()


@asynccontextmanager
async def _browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield browser
        await browser.close()


async def _take(browser: Browser, address: str, folder: Path, name: str, *, await_text: str) -> list[Path]:
    written = []
    for width, size in (("desktop", WIDE), ("phone", NARROW)):
        for scheme in ("light", "dark"):
            options: dict[str, Any] = {"viewport": size, "color_scheme": scheme, "reduced_motion": "reduce"}
            page = await browser.new_page(**options)
            await page.goto(address)
            await page.get_by_text(await_text).first.wait_for(timeout=PAGE_SECONDS * 1_000)
            file = folder / f"{name}-{width}-{scheme}.png"
            # A phone's page is long: only its first screens are taken.
            await page.screenshot(path=file, full_page=width == "desktop")
            await page.close()
            _reduce_colours(file)
            written.append(file)
    return written


def _reduce_colours(file: Path) -> None:
    """Reduce the image to 256 colours: a third of the size without a visible difference."""
    with Image.open(file) as image:
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            file, optimize=True
        )


def main() -> int:
    """Parse the command line and take the screenshots."""
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "deploy/screenshots", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=90.0, help="duration of the traffic (%(default)s)")
    parser.add_argument("--rabbitmq", choices=("3.10", "4"), default="4", help="RabbitMQ version (default: 4)")
    options = parser.parse_args()
    end_on_signals()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        find_chromium()
        with tempfile.TemporaryDirectory(prefix="closeout-screenshots-", ignore_cleanup_errors=True) as name:
            work = Path(name)
            work.chmod(0o755)  # PostgreSQL may have to run as another user
            with running_pair(work / "servers", options.rabbitmq, management=False) as (*_, environment):
                set_up(environment)
                demo = Demonstration(environment, work)
                worker = demo.start_worker()
                try:
                    demo.await_ready()
                    print(f"screenshots: publishing for {options.seconds:g} s", file=sys.stderr, flush=True)
                    written = asyncio.run(take_all(demo, options.folder.absolute(), options.seconds))
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
