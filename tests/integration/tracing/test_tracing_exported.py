"""A worker process with a collector, with an unavailable one, and without OpenTelemetry."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from consumer.contract.names import PARKED_QUEUE
from consumer.parked.copies import headers_of
from tests.support import run_messages as runs
from tests.support.roles import WORKER, WORKER_USER, as_role, as_user
from tests.support.traffic import emptied, eventually, listen, publish, published_runs, received
from tests.support.waiting import PATIENCE

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
PHASES = ["INCIDENT_CREATED", "POLICY_EVALUATED", "TRACE_COMPLETED", "COMMITTED"]
RUNS = 120
# While the first spans are being sent, the next ones do not fit into the queue.
SMALL_QUEUE = {"OTEL_BSP_SCHEDULE_DELAY": "10", "OTEL_BSP_MAX_QUEUE_SIZE": "20", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "20"}
WORK = "import sys; sys.argv[1:] = ['worker']; from consumer.cli import main; main()"
WITHOUT_OPENTELEMETRY = "import sys; sys.modules['opentelemetry'] = None; " + WORK


@asynccontextmanager
async def process(
    database_url: str, amqp_url: str, code: str = WORK, **environ: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    """Run a worker process and stop it; its log is complete after that."""
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
            "DATABASE_URL": as_role(database_url, WORKER), "AMQP_URL": as_user(amqp_url, WORKER_USER),
            "HTTP_HOST": "127.0.0.1", "HTTP_PORT": "0", "TRANSACTION_COORDINATOR_ENABLED": "true", **environ,
        },
    )  # fmt: skip
    log: list[str] = []
    try:
        yield made, log
        made.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(made.communicate(), PATIENCE)
        log += errors.decode().splitlines()
    finally:
        if made.returncode is None:
            made.kill()
            await made.wait()


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP endpoint, and the requests that reach it."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()
        thread.join()


async def test_an_endpoint_setting_exports_all_spans_including_those_left_at_shutdown(
    database_url, amqp_url, engine, broker
):
    with collector() as (endpoint, requests):
        async with process(database_url, amqp_url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as (made, log):
            await publish(broker, runs.body(), headers={"traceparent": TRACEPARENT, "tracestate": "0@b@c=1"})
            await eventually(engine, published_runs(), 1)
        assert made.returncode == 0
        assert {json.loads(line)["level"] for line in log} == {"info"}
    resources = [resource for request in requests for resource in request.resource_spans]
    named = {a.key: a.value.string_value for a in resources[0].resource.attributes}
    assert named["service.name"] == "closeout"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    attributes = {span.name.split()[0]: {a.key: a.value for a in span.attributes} for span in spans}
    messaging, ours = ["receive", "process", "publish"], ["close", *PHASES]
    assert set(attributes) == {*messaging, *ours}
    for name in messaging:
        assert attributes[name]["server.address"].string_value == "127.0.0.1"
        assert attributes[name]["server.port"].int_value == urlsplit(amqp_url).port


@pytest.mark.parametrize("collector_is", ["away", "silent"])
async def test_an_unresponsive_collector_loses_no_run_and_delays_shutdown_only_briefly(
    database_url, amqp_url, engine, broker, collector_is
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if collector_is == "silent":
            listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        await publish(broker, *[runs.body() for _ in range(RUNS)], headers={"traceparent": TRACEPARENT})
        # By default the exporter would retry for two minutes.
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "120", **SMALL_QUEUE}
        async with process(database_url, amqp_url, **environ) as (made, log):
            await eventually(engine, published_runs(), RUNS)
        assert made.returncode == 0
    assert await emptied(broker, PARKED_QUEUE) == []
    logged = [json.loads(line)["event"] for line in log if line.startswith("{")]
    assert {"exporting spans", "Queue full, dropping Span.", "spans not exported in time", "stopped"} <= set(logged)
    assert not any("rror" in event and "Transient" not in event for event in logged)


async def test_without_opentelemetry_the_traceparent_is_propagated_and_a_warning_logged(
    database_url, amqp_url, engine, broker
):
    events = await listen(broker)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    async with process(database_url, amqp_url, WITHOUT_OPENTELEMETRY, **environ) as (made, log):
        await publish(broker, runs.body(), headers={"traceparent": TRACEPARENT})
        await eventually(engine, published_runs(), 1)
    assert made.returncode == 0
    await received(events, 3)
    assert [headers_of(event)["traceparent"] for event in events] == [TRACEPARENT] * 3
    assert [json.loads(event.body)["traceparent"] for event in events] == [TRACEPARENT] * 3
    assert any("install deploy/requirements-otel.txt" in line for line in log)
