"""The response of each path, and its cost."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from urllib.parse import quote
from uuid import uuid4

import pytest
from markupsafe import escape
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from consumer.console import queries as database
from consumer.console.app import Console
from consumer.console.formatting import run_path
from consumer.console.queries import APPLICATION_NAME, SESSIONS, create_console_engine
from consumer.console.recently_parked import ParkedLately
from consumer.console.responses import CONTENT_SECURITY_POLICY
from consumer.contract.scalars import derived_id
from consumer.errors import UnavailableError
from consumer.health import Health
from consumer.metrics import Metrics
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, repair_writes
from tests.support.console_site import close_out, close_out_directly, path_of, until_shown
from tests.support.faults.proxy import Proxy
from tests.support.http import ready, request
from tests.support.traffic import eventually, publish, worker
from tests.support.waiting import until

RUN = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def proxies(postgres, rabbit) -> AsyncIterator[list[Proxy]]:
    """Proxies to PostgreSQL and to RabbitMQ."""
    made = [await Proxy(server.port).accept() for server in (postgres, rabbit)]
    yield made
    for proxy in made:
        proxy.close()


@pytest.fixture
def urls(proxies, postgres, rabbit, database_url, amqp_url) -> list[str]:
    """The URLs of both servers, behind *proxies*."""
    direct = ((database_url, postgres), (amqp_url, rabbit))
    return [
        url.replace(f":{server.port}/", f":{proxy.port}/") for (url, server), proxy in zip(direct, proxies, strict=True)
    ]


async def test_the_overview_shows_the_latest_runs_rollbacks_and_parked_messages(database_url, amqp_url, engine, broker):
    good, unlucky = runs.body(), runs.body()
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="1") as service:
        await close_out(broker, engine, good)
        await break_writes_to(engine, "traces", "unforeseen error")
        await publish(broker, unlucky, b"{nonsense", runs.body(tenant_id="no spaces"), message_id="m-1")
        page = await until_shown(
            service, "/", "3 messages are parked", path_of(good), "unforeseen error", "attempt 1</span>",
            "attempts_exhausted <b>1", "invalid_json <b>1", "schema_violation <b>1", "1 worker consumes",
            "found &#34;no spaces&#34;",
        )  # fmt: skip
        await repair_writes(engine)
    assert page.status == 200
    assert page.body.count(f'href="{path_of(unlucky)}"') == 2  # rolled back, and parked


async def test_the_overview_of_a_healthy_service_reports_no_problem(database_url, amqp_url):
    async with worker(database_url, amqp_url) as service:
        assert "No attempt was rolled back." in (await until_shown(service, "/", "All is well")).body


async def test_a_run_page_shows_its_phases_incident_evaluation_steps_and_events(database_url, amqp_url, engine, broker):
    body = runs.body(metadata={"region": "eu-west", "retries": 2})
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body, message_id="from-runner-7")
        page = await request(service.http.port, path_of(body))
    assert page.status == 200
    for words in (
        "events published", "EXECUTION_TIMEOUT", "no answer within 30 s", "search", "book", "SKILL_ERROR",
        "incident.created", "policy.evaluated", "run.finalized", "eu-west", "from-runner-7", "0.0125", "gpt-4o",
        "to the last confirm",
    ):  # fmt: skip
        assert words in page.body, words
    assert "data-live" not in page.body  # it will not change


async def test_a_run_page_with_unpublished_events_shows_them_and_updates(database_url, amqp_url, engine, broker):
    body = runs.body()
    async with worker(database_url, amqp_url, REQUIRE_EVENT_SUBSCRIBERS="true") as service:
        await publish(broker, body)
        await eventually(engine, text("SELECT count(*) FROM governance.run_completions"), 1)
        page = await until_shown(service, path_of(body), "in the outbox since")
        overview = await until_shown(service, "/", "runs, the oldest")
    assert f'data-live="{path_of(body)}"' in page.body
    assert "not yet" in page.body
    assert "To publish" in overview.body


NOTHING = (
    ("/runs/acme/not%20an%20id", "run id: found &#39;not an id&#39;; expected a UUID such as"),
    ("/runs/acme/another/id", "It may still be queued, or it was parked"),
    ("/runs/no%20spaces/" + RUN, "tenant id: found &#39;no spaces&#39;; expected 1 to 128 characters"),
    ("/runs/" + "a" * 129 + "/" + RUN, "expected 1 to 128 characters of A-Z a-z 0-9 . _ -"),
    ("/runs/acme%00/" + RUN, "tenant id: found"),
    ("/runs/acme/" + RUN, "It may still be queued, or it was parked"),
    ("/runs?q=" + RUN, "It may still be queued, or it was parked"),
    ("/runs?q=%3Cscript%3E", "No run <code>&lt;script&gt;</code>"),
    ("/runs?q=" + "9" * 5_000, "run id: found"),
    ("/runs?q=../../etc/passwd", "It may still be queued, or it was parked"),
    ("/nothing/here", "There is no page at"),
    ("/static/../pages.py", "There is no page at"),
    ("/static/pages.py", "no such file"),
    ("/static/%2e%2e%2fpages.py", "There is no page at"),
)


async def test_an_unknown_page_or_run_is_404_with_an_explanation(database_url, amqp_url):
    async with worker(database_url, amqp_url) as service:
        for path, words in NOTHING:
            response = await request(service.http.port, path)
            assert response.status == 404, path
            assert words in response.body, path


async def test_the_page_of_a_parked_run_explains_why(database_url, amqp_url, broker):
    body = runs.body(status="done")
    async with worker(database_url, amqp_url) as service:
        await publish(broker, body)
        response = await until_shown(service, path_of(body), "This worker parked messages that name it")
    assert response.status == 404
    assert "one of succeeded, failed, halted, aborted" in response.body


async def test_the_search_accepts_a_run_id_a_tenant_with_an_id_and_a_page_url(database_url, amqp_url, engine, broker):
    body, shared = runs.body(), str(uuid4())
    both = [runs.body(run_id=shared, tenant_id=tenant) for tenant in ("acme", "zeta.io")]
    run_id = str(runs.run_id_of(body))
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body, *both)
        for query in (run_id, run_id.upper(), run_id.replace("-", ""), f"acme/{run_id}", f"%20{run_id}%20",
                      f"http://host:9464/runs/acme/{run_id}"):  # fmt: skip
            response = await request(service.http.port, f"/runs?q={query}")
            assert (response.status, response.headers["location"]) == (303, path_of(body)), query
        listed = await request(service.http.port, f"/runs?q={shared}")
        assert (await request(service.http.port, "/runs?q=")).headers["location"] == "/"
    assert "2 tenants have this run id" in listed.body
    assert all(path_of(one) in listed.body for one in both)


async def test_the_search_accepts_every_spelling_of_a_text_id(database_url, amqp_url, engine):
    ids = ["flow/17", "wf/runs/5", "/x", "a#b/c?d%2F", ".."]
    await close_out_directly(engine, *(runs.body(run_id=run_id, agent_id=f"agent of {run_id}") for run_id in ids))
    async with worker(database_url, amqp_url) as service:
        for run_id in ids:
            path = run_path("acme", run_id)
            page = await request(service.http.port, path)
            assert (page.status, f"agent of {escape(run_id)}" in page.body) == (200, True), run_id
            for query in (run_id, f"acme/{run_id}", f"http://host:9464{path}", f"https://host/console{path}"):
                if query.startswith("http") and "?q=" in path:
                    continue
                found = await request(service.http.port, f"/runs?q={quote(query, safe='')}")
                if found.status == 303:
                    found = await request(service.http.port, found.headers["location"])
                assert (found.status, f"agent of {escape(run_id)}" in found.body) == (200, True), query


async def test_a_run_page_links_parent_and_children_and_draws_steps_in_time(database_url, amqp_url, engine):
    at = "2026-11-01T12:00:0{}Z"
    steps = [
        {"index": 0, "status": "succeeded", "skill": "plan", "kind": "llm", "model": "gpt-4o", "input_tokens": 1200,
         "output_tokens": 34, "started_at": at.format(0), "duration_ms": 2_000},
        {"index": 1, "status": "succeeded", "kind": "tool", "started_at": at.format(2), "duration_ms": 2_000},
        {"index": 2, "status": "failed", "kind": "tool", "started_at": at.format(2), "error_message": "no seats"},
    ]  # fmt: skip
    parent = runs.body(run_id="flow/17", error_code="openai.Timeout")
    named_by_uuid = str(derived_id("acme", "flow/17"))
    child = runs.body(run_id="flow/17:1", parent_run_id="flow/17", session_id="chat-9", steps=steps)
    other = runs.body(run_id="flow/17:2", parent_run_id=named_by_uuid)
    await close_out_directly(engine, parent, child, other)
    async with worker(database_url, amqp_url) as service:
        above = (await request(service.http.port, run_path("acme", "flow/17"))).body
        below = (await request(service.http.port, run_path("acme", "flow/17:1"))).body
    for run_id in ("flow/17:1", "flow/17:2"):
        assert f'href="{run_path("acme", run_id)}"' in above
    assert "openai.Timeout" in above
    assert "OPENAI_TIMEOUT" in above
    for words in (
        f'href="{run_path("acme", "flow/17")}"', "chat-9", "drawn in time", "1,200 input + 34 output tokens",
        "at 12:00:02.000", "no seats",
    ):  # fmt: skip
        assert words in below, words
    places = [float(x) for x in re.findall(r'class="s-fill" x="([\d.]+)"', below)]
    assert places[0] == 0
    assert places[1] == places[2] == pytest.approx(498.5)


@pytest.mark.parametrize("tenant", [".", ".."])
async def test_a_tenant_named_like_a_relative_path_is_served_through_the_search(
    database_url, amqp_url, engine, broker, tenant
):
    body = runs.body(tenant_id=tenant)
    run_id = runs.run_id_of(body)
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body)
        found = await request(service.http.port, f"/runs?q={tenant}%2F{run_id}")
        overview = await until_shown(service, "/", f"/runs?q={tenant}%2F{run_id}")
        by_id = await request(service.http.port, f"/runs?q={run_id}")
    assert (found.status, overview.status) == (200, 200)
    assert "no answer within 30 s" in found.body
    assert by_id.headers["location"] == f"/runs?q={tenant}%2F{run_id}"


async def test_only_get_and_head_are_allowed_and_every_response_has_security_headers(database_url, amqp_url):
    async with worker(database_url, amqp_url) as service:
        for path in ("/", "/live", "/runs?q=", f"/runs/acme/{RUN}", "/static/console.css", "/nothing", "/metrics"):
            for method in ("GET", "HEAD"):
                response = await request(service.http.port, path, method=method)
                assert response.status in {200, 303, 404}
                assert response.body == "" or method == "GET"
                assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
                assert response.headers["x-content-type-options"] == "nosniff"
                assert response.headers["referrer-policy"] == "no-referrer"
                assert response.headers["x-frame-options"] == "DENY"
            if path == "/nothing":
                continue
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
                response = await request(service.http.port, path, method=method)
                assert response.status == 405, (method, path)
                assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
                assert "content-security-policy" in response.headers
    for directive in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"):
        assert directive in CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY


async def test_pages_are_not_cached_and_files_are_revalidated(database_url, amqp_url):
    async with worker(database_url, amqp_url) as service:
        assert (await request(service.http.port, "/")).headers["cache-control"] == "no-store"
        for name, kind in (("console.css", "text/css"), ("live.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
            file = await request(service.http.port, f"/static/{name}")
            assert file.headers["content-type"].startswith(kind)
            again = await request(
                service.http.port, f"/static/{name}", headers=f"If-None-Match: {file.headers['etag']}\r\n"
            )
            assert (again.status, again.body) == (304, "")


async def test_fifty_viewers_cause_no_more_queries_than_one(database_url, amqp_url, engine, broker, monkeypatch):
    now = 1_000.0
    # A fake clock: a busy machine may need longer for a hundred responses than a read stays fresh.
    monkeypatch.setattr("consumer.console.shared_reads.monotonic", lambda: now)
    body = runs.body()
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body)
        statements: list[str] = []
        event.listen(
            service.console._engine.sync_engine,
            "before_cursor_execute",
            lambda _conn, _cursor, statement, *_: statements.append(statement),
        )
        # Until the one read of each is done.
        await asyncio.gather(
            until_shown(service, "/", path_of(body)), until_shown(service, path_of(body), "EXECUTION_TIMEOUT")
        )
        one = Counter(statements)
        now += 30  # the result is no longer fresh
        statements.clear()
        responses = await asyncio.gather(
            *(request(service.http.port, path, within=20) for path in ["/", path_of(body)] * 50)
        )
        assert {response.status for response in responses} == {200}
        assert statements
        assert Counter(statements) <= one
        sessions = text(f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{APPLICATION_NAME}'")
        async with engine.connect() as conn:
            assert (await conn.execute(sessions)).scalar_one() <= SESSIONS


async def test_an_idle_console_queries_no_server_and_closes_its_connections(
    database_url, amqp_url, engine, broker, monkeypatch
):
    sessions = text(f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{APPLICATION_NAME}'")
    async with worker(database_url, amqp_url) as service:
        await until(lambda: ready(service.http.port))
        await eventually(engine, sessions, 0)
        await until_shown(service, "/", "All is well")
        queues = service.console._overview._queues._connection
        assert queues.is_open
        monkeypatch.setattr("consumer.console.app._IDLE_SECONDS", 1.0)
        await eventually(engine, sessions, 0)
        await until(lambda: not queues.is_open)
        await until_shown(service, "/", "All is well")  # the next viewer gets a complete page


async def test_console_sessions_are_read_only_and_time_out(database_url):
    engine = create_console_engine(f"{database_url}?target_session_attrs=read-write")
    try:
        with pytest.raises(DBAPIError, match="read-only"):
            async with engine.connect() as conn:
                await conn.execute(text("DELETE FROM governance.rollbacks"))
        with pytest.raises(UnavailableError, match="query canceled after 3 s"):
            async with database._session(engine) as conn:
                await conn.execute(text("SELECT pg_sleep(60)"))
    finally:
        await engine.dispose()


async def test_the_latest_runs_and_the_tenants_of_an_id_are_read_without_a_scan(database_url, engine):
    """No query of the console scans a table, with fresh statistics and without any."""
    await _fill(engine, 20_000)
    console = create_console_engine(database_url)
    plans: list[str] = []

    def explain(conn, _cursor, statement, parameters, *_):
        if statement.lstrip().startswith(("SELECT", "WITH")) and "governance" in statement:
            plans.append(
                "\n".join(row[0] for row in conn.exec_driver_sql(f"EXPLAIN {statement}", parameters)),
            )

    event.listen(console.sync_engine, "before_cursor_execute", explain)
    try:
        for analyze in (False, True):
            if analyze:
                async with engine.connect() as conn:
                    await conn.execution_options(isolation_level="AUTOCOMMIT")
                    await conn.execute(text("VACUUM ANALYZE governance.run_completions"))
            for look in (database.latest_runs, database.pace, database.latest_rollbacks, database.pending_events):
                await look(console)
            assert await database.owners(console, str(uuid4())) == []
            assert await database.owners(console, "run-17") == []
    finally:
        await console.dispose()
    assert plans
    for plan in plans:
        assert "Seq Scan" not in plan, plan


# Seconds for a response that takes 0.6; a busy machine must not exceed it. A server that does not respond takes longer.
PROMPT = 10.0


@pytest.fixture
def long_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the timeouts for a server that does not respond to a minute."""
    for name in ("queries._CONNECT_SECONDS", "queries._COMMAND_SECONDS", "queue_depths._RESPONSE_SECONDS"):
        monkeypatch.setattr(f"consumer.console.{name}", 60.0)


@pytest.mark.usefixtures("long_timeouts")
async def test_the_page_responds_and_names_the_unavailable_server(proxies, urls, engine, broker):
    body = runs.body()
    async with worker(*urls) as service:
        await close_out(broker, engine, body)
        await until_shown(service, "/", path_of(body))
        for proxy, name, other in ((proxies[0], "PostgreSQL", "RabbitMQ"), (proxies[1], "RabbitMQ", "PostgreSQL")):
            proxy.refuse()
            proxy.cut()
            page = await until_shown(service, "/", f"{name} is not available", within=PROMPT)
            assert f"{other} is not available" not in page.body
            assert path_of(body) in page.body  # the last known state is still shown
            await proxy.accept()
            await until_shown(service, "/", "All is well", within=PROMPT)
            proxy.stall()
            await until_shown(service, "/", f"{name} has not responded for", within=PROMPT)
            if name == "PostgreSQL":
                await until_shown(service, "/", "as of", within=PROMPT)
            gone = await request(service.http.port, f"/runs/acme/{uuid4()}")
            assert gone.status == (503 if name == "PostgreSQL" else 404)
            proxy.cut()
            proxy.flow()
            await until_shown(service, "/", "All is well", within=PROMPT)


@pytest.mark.usefixtures("long_timeouts")
async def test_closing_the_console_does_not_wait_for_unresponsive_servers(proxies, urls):
    parked = ParkedLately()
    console = Console(
        database_url=urls[0], amqp_url=urls[1], metrics=Metrics(), health=Health(Metrics()), parked=parked
    )
    assert "ready in RabbitMQ" in await console._live_part()
    for proxy in proxies:
        proxy.stall()

    async def shown() -> bool:
        return "has not responded" in await console._live_part()

    await until(shown, every=0.1)
    async with asyncio.timeout(PROMPT):
        await console.close()


async def test_a_user_without_configure_permission_can_read_queue_lengths(
    postgres, rabbit, database_url, amqp_url, broker
):
    vhost = amqp_url.rpartition("/")[2]
    rabbit.add_user("looks-only", "pw", "^$", ".*", ".*", vhost)
    await publish(broker, b"{one", b"{two")
    async with worker(database_url, f"amqp://looks-only:pw@127.0.0.1:{rabbit.port}/{vhost}") as service:
        await until_shown(service, "/", "2 messages are parked")


async def test_an_error_in_the_console_does_not_affect_the_worker(database_url, amqp_url, engine, broker, monkeypatch):
    def bug(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(database, "latest_runs", bug)
    monkeypatch.setattr("consumer.console.history.read_counts", bug)
    async with worker(database_url, amqp_url) as service:
        page = await until_shown(service, "/", "a bug")
        assert page.status == 200
        await close_out(broker, engine, runs.body())


async def test_a_page_has_no_inline_or_external_resources(database_url, amqp_url, engine, broker):
    body = runs.body()
    async with worker(database_url, amqp_url) as service:
        await close_out(broker, engine, body)
        pages = [await request(service.http.port, path) for path in ("/", path_of(body), "/runs?q=x")]
    for page in pages:
        assert "style=" not in page.body
        assert "<style" not in page.body
        assert "http" not in page.body.replace('http-equiv="', "")
        assert page.body.count("<script") == 1
        assert '<script src="/static/live.js" defer></script>' in page.body


async def _fill(engine, number: int) -> None:
    metadata = json.dumps({"region": "eu"})
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.run_completions (tenant_id, run_id, status, phase, mode, payload_digest, "
                "started_at, completed_at, is_synthetic, metadata, received_at, committed_at) "
                "SELECT 'tenant-' || g % 20, gen_random_uuid(), 'succeeded', 'COMMITTED', 'atomic', '', t, t, false, "
                ":metadata, t, t FROM (SELECT g, now() - g * interval '1 s' AS t FROM generate_series(1, :n) g) x"
            ),
            {"metadata": metadata, "n": number},
        )
