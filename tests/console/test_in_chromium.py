"""The console in a real browser: hostile text is not executed, pages fit their window and update themselves."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from chromium import ARGUMENTS, find_chromium
from playwright.async_api import Browser, Page, Request, async_playwright, expect

from consumer.assembly import Service
from domains.policies.apply import apply_policies
from domains.policies.files import PolicyDraft
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, repair_writes
from tests.support.console_site import HOSTILE, close_out, hostile_run, path_of, until_shown
from tests.support.traffic import publish, worker

# Records the violations of the content security policy in the page.
WATCH = "window.stopped = []; addEventListener('securitypolicyviolation', e => stopped.push(e.violatedDirective))"
# Elements that extend beyond the right edge of the window, except within a scrolling box.
BEYOND = """() => [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('pre, .c-run, svg'))
    .map(e => e.outerHTML.slice(0, 200))"""


# Milliseconds: the deadline of a failed expectation; a busy machine must not exceed it.
expect.set_options(timeout=30_000)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield opened
        await opened.close()


@asynccontextmanager
async def visit(browser: Browser, service: Service, path: str, **options: Any) -> AsyncIterator[Page]:
    """Open *path*; afterwards assert that no foreign script ran and the page reported no error."""
    page = await browser.new_page(base_url=f"http://127.0.0.1:{service.http.port}", **options)
    wrong: list[str] = []
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda message: wrong.append(message.text) if "status of 404" not in message.text else None)
    await page.add_init_script(WATCH)
    await page.goto(path)
    yield page
    if options.get("java_script_enabled", True):
        assert await page.evaluate("[window.stopped, window.hacked]") == [[], None]
    assert wrong == []
    await page.close()


async def test_hostile_text_in_every_field_is_shown_and_not_executed(database_url, amqp_url, engine, broker, browser):
    names = list(HOSTILE.values())
    drafts = [
        PolicyDraft(name=name, effect="flag", severity="HIGH", condition=condition, tenant_id=None, enabled=True)
        for name, condition in ((names[0], "true"), (names[1], "run.metadata.absent > 1"))
    ]
    body, unlucky = hostile_run(), hostile_run()
    parked = [json.dumps({"tenant_id": words, "run_id": words, "schema_version": words}).encode() for words in names]
    async with engine.begin() as conn:
        await apply_policies(conn, drafts)
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="1") as service:
        await close_out(broker, engine, body, message_id=HOSTILE["script"])
        await break_writes_to(engine, "traces", HOSTILE["image"])
        await publish(broker, unlucky, *parked, message_id=HOSTILE["style"])
        await until_shown(service, "/", f"{len(parked) + 1} messages are parked")
        await repair_writes(engine)
        for path, least in (("/", 2), (path_of(body), 9), ("/runs?q=" + "%22%3E%3Cscript%3Ealert(9)%3C/script%3E", 0)):
            async with visit(browser, service, path) as page:
                assert await page.locator("script").count() == 1
                assert await page.locator("img:not(.brand img), iframe, object, embed, base, [style]").count() == 0
                attributes = "e => [...e.attributes].map(a => a.name)"
                every = await page.evaluate(f"[...document.querySelectorAll('*')].flatMap({attributes})")
                assert not {name for name in every if name.startswith("on")}
                links = await page.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
                assert all(link.startswith("/") for link in links)
                shown = await page.locator("main").inner_text()
                assert not set("\u202e\u2066\u2069\u200f\x1b\x07\x9d\u2028\u2029") & set(shown)
                visible = [words for name, words in HOSTILE.items() if name not in {"turned", "control", "entity"}]
                assert sum(words in shown for words in visible) >= min(least, len(visible))
                if path == path_of(body):
                    assert "safeU+202Etxt.exe" in shown
                    assert "U+001B[31mred" in shown
                if "?q=" in path:
                    assert await page.locator("input").input_value() == '"><script>alert(9)</script>'


async def test_a_megabyte_message_is_truncated_and_a_thousand_steps_are_collapsed(
    database_url, amqp_url, engine, broker, browser
):
    steps = [{"index": n, "skill": f"step-{n}", "status": "succeeded", "duration_ms": n} for n in range(1_000)]
    steps[0] |= {"kind": "llm", "model": "m" * 300, "input_tokens": 10**12, "started_at": "2026-11-01T12:00:00Z"}
    body = runs.body(error_message="W" * 900_000, steps=steps)
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body)
        async with visit(browser, service, path_of(body), viewport={"width": 360, "height": 740}) as page:
            await expect(page.locator("pre")).to_contain_text("cut: the first 2,000 of 900,000 characters")
            await expect(page.get_by_text("step-999")).to_be_hidden()
            await page.get_by_text("960 more steps").click()
            await expect(page.get_by_text("step-999")).to_be_visible()
            assert await page.evaluate(BEYOND) == []


async def test_the_browser_detects_an_injected_script(database_url, amqp_url, browser):
    """The other tests rely on this: an injected script is blocked, and the blocking is detected."""
    async with worker(database_url, amqp_url) as service:
        page = await browser.new_page(base_url=f"http://127.0.0.1:{service.http.port}")
        await page.add_init_script(WATCH)
        await page.goto("/")
        for attempt in (
            "document.body.innerHTML = '<img src=x onerror=\"window.hacked = 1\">'",
            "const s = document.createElement('script'); s.text = 'window.hacked = 1'; document.body.append(s)",
        ):
            refused = await page.evaluate(f"() => {{ try {{ {attempt}; return '' }} catch (e) {{ return e.name }} }}")
            assert refused == "TypeError"
        assert await page.evaluate("[window.stopped.length > 0, window.hacked]") == [True, None]


async def test_no_page_is_wider_than_its_window_with_long_text(database_url, amqp_url, engine, broker, browser):
    long = "W" * 400
    body = runs.body(
        tenant_id="t" * 128, agent_id=long, model=long, error_message=long, error_code="E" * 64,
        metadata={long[:150]: long, "a": 1}, is_synthetic=True, synthetic_scenario_id=long,
        steps=[{"index": 2**31 - 1, "skill": long, "status": "failed", "duration_ms": 2**62, "error_code": "E" * 64,
                "cost_usd": 123456789.123456789}],
        usage={"cost_usd": 10**11, "input_tokens": 2**62, "output_tokens": 2**62},
    )  # fmt: skip
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="1") as service:
        await close_out(broker, engine, body, message_id="M" * 200)
        await break_writes_to(engine, "incidents", long)
        await publish(broker, runs.body(tenant_id="u" * 128), json.dumps({"schema_version": long}).encode())
        await until_shown(service, "/", "2 messages are parked")
        await repair_writes(engine)
        for path in ("/", path_of(body), f"/runs/{'v' * 128}/{uuid4()}", "/runs?q=" + "w" * 300):
            async with visit(browser, service, path) as page:
                for width in (320, 360, 768, 1200):
                    await page.set_viewport_size({"width": width, "height": 740})
                    assert await page.evaluate("document.documentElement.scrollWidth") == width, path
                    assert await page.evaluate(BEYOND) == [], path


async def test_changes_are_updated_in_place_without_reloading_the_page(database_url, amqp_url, engine, broker, browser):
    first, second = runs.body(), runs.body()
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, first)
        await until_shown(service, "/", path_of(first))
        async with visit(browser, service, "/") as page:
            await page.evaluate("window.same = true")
            await page.locator(f"a[href='{path_of(first)}']").focus()
            await close_out(broker, engine, second)
            await expect(page.locator(f"a[href='{path_of(second)}']")).to_be_visible()
            assert await page.evaluate("window.same")
            # The focus is kept, although the list around it was replaced.
            assert await page.evaluate("document.activeElement.getAttribute('href')") == path_of(first)


async def test_the_page_polls_every_two_seconds_except_while_hidden_or_paused(database_url, amqp_url, browser):
    hidden = "Object.defineProperty(document, 'hidden', {get: () => window.away === true})"
    async with worker(database_url, amqp_url) as service, visit(browser, service, "/livez") as page:
        polls: list[Request] = []
        page.on("request", lambda request: polls.append(request) if request.url.endswith("/live") else None)
        await page.clock.install()
        await page.add_init_script(hidden)
        await page.goto("/")

        async def seconds_until_polled(times: int) -> float:
            """Measured by the page's clock, which also advances with real time."""
            started = await page.evaluate("Date.now()")
            polls.clear()
            while len(polls) < times:
                await page.clock.run_for(250)
                await asyncio.sleep(0.02)  # for the response, which takes real time
            return float(await page.evaluate("Date.now()") - started) / 1000

        async def polls_within_a_minute() -> int:
            polls.clear()
            await page.clock.run_for(60_000)
            return len(polls)

        assert await seconds_until_polled(5) >= 4 * 2
        await page.evaluate("window.away = true")
        assert await polls_within_a_minute() <= 1  # a request that was already sent
        assert await polls_within_a_minute() == 0
        await page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
        assert await seconds_until_polled(2) >= 2
        await page.get_by_role("button", name="Live").click()
        await expect(page.get_by_role("button", name="Paused")).to_be_visible()
        assert await polls_within_a_minute() == 0
        await page.get_by_role("button", name="Paused").click()
        assert await seconds_until_polled(2) >= 2
        await expect(page.get_by_role("button", name="Live")).to_be_visible()


async def test_an_update_does_not_replace_selected_text(database_url, amqp_url, engine, broker, browser):
    first, second = runs.body(), runs.body()
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, first)
        await until_shown(service, "/", path_of(first))
        async with visit(browser, service, "/") as page:
            link = page.locator(f"a[href='{path_of(first)}']")
            await link.select_text()
            before = await page.locator("[data-part=as-of]").inner_text()
            await close_out(broker, engine, second)
            await until_shown(service, "/live", path_of(second))
            await expect(page.locator("[data-part=as-of]")).not_to_have_text(
                before,
            )
            assert await page.evaluate("getSelection().toString()") == path_of(first).removeprefix("/runs/")
            await page.evaluate("getSelection().removeAllRanges()")
            await expect(page.locator(f"a[href='{path_of(second)}']")).to_be_visible()


async def test_the_page_shows_when_the_worker_stops_and_resumes_responding(database_url, amqp_url, browser):
    async with worker(database_url, amqp_url) as service:
        page = await browser.new_page(base_url=f"http://127.0.0.1:{service.http.port}")
        await page.goto("/")
        await page.route("**/live", lambda route: route.abort())
        await expect(page.get_by_role("button", name="No response since")).to_be_visible()
        await page.unroute("**/live")
        await expect(page.get_by_role("button", name="Live")).to_be_visible()


async def test_the_page_of_an_unknown_run_becomes_the_runs_page_once_it_is_stored(
    database_url, amqp_url, engine, broker, browser
):
    body = runs.body()
    async with worker(database_url, amqp_url) as service, visit(browser, service, path_of(body)) as page:
        await expect(page.get_by_role("heading", name="Not known here")).to_be_visible()
        await close_out(broker, engine, body)
        await expect(page.get_by_role("heading", name=str(runs.run_id_of(body)))).to_be_visible()


async def test_the_pages_work_without_scripts_except_for_updates(database_url, amqp_url, engine, broker, browser):
    body = runs.body()
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body)
        await until_shown(service, "/", path_of(body))
        async with visit(browser, service, "/", java_script_enabled=False) as page:
            await expect(page.get_by_role("link", name="Refresh")).to_be_visible()
            await expect(page.get_by_text("All is well")).to_be_visible()
            await page.get_by_role("searchbox").fill(str(runs.run_id_of(body)))
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("heading", name=str(runs.run_id_of(body)))).to_be_visible()
            await expect(page.get_by_text("no answer within 30 s")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_has_enough_contrast(database_url, amqp_url, engine, broker, browser, scheme):
    """4.5:1, as WCAG AA requires of text, on both pages."""
    body = runs.body(steps=[{"index": n, "skill": "s", "status": s, "error_code": "X", "duration_ms": 5}
                            for n, s in enumerate(("succeeded", "failed", "skipped"))])  # fmt: skip
    async with worker(database_url, amqp_url, TRANSACTION_COORDINATOR_ENABLED="false") as service:
        await close_out(broker, engine, body)
        await publish(broker, b"{nonsense")
        await until_shown(service, "/", "1 message is parked")
        for path in ("/", path_of(body)):
            async with visit(browser, service, path, color_scheme=scheme) as page:
                assert await page.evaluate(TOO_FAINT) == []


TOO_FAINT = """() => {
    const parse = c => c.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => {
        for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c;
        }
        return [255, 255, 255];
    };
    const words = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    return [...document.querySelectorAll('body *')].filter(e => words(e) && e.checkVisibility() && !e.closest('svg'))
        .map(e => {
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
            return [(a + 0.05) / (b + 0.05), e.className, e.textContent.slice(0, 40)];
        })
        .filter(([ratio]) => ratio < 4.5);
}"""
