"""A worker that has processed every kind of message, and a Prometheus that has scraped it."""

import asyncio
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pika
from servers import PostgresServer, PrometheusServer, RabbitServer
from servers.ports import Port
from servers.rabbitmq import USER

from config.settings import Settings
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.contract.names import ADJUSTABLE_FIELDS, EVENTS_EXCHANGE
from tests.support import run_messages as runs
from tests.support.command_line import CLOSEOUT
from tests.support.http import request_blocking
from tests.support.traffic import publish
from tests.support.waiting import until

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "closeout.rules.yaml"
SCRAPED_SECONDS = 2.0  # after which a scrape has come or failed: it may take one
PREFETCH = int(Settings.model_fields["prefetch_count"].default)
KEPT_BACK = 10  # runs whose events are unpublished while the exchange is missing

SUPPRESS = """\
- {name: known trouble, effect: suppress_incident, severity: LOW, tenant_id: acme, condition: run.model == "suppressed"}
- {name: flagged, effect: flag, severity: LOW, condition: run.model == "flagged"}
- {name: failing, effect: flag, severity: LOW, condition: run.model == "odd" && run.metadata.absent > 1}
"""
# Tables that each refuse the rows of one tenant: the transaction of such a run ends in the phase before the write.
FAILING_TABLES = ("incidents", "policy_evaluations", "traces", "outbox_events")
# Transactions of one more tenant fail on the atomic path only.
FAULTS = """
CREATE FUNCTION governance.refuse() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'atomic writes are refused'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON governance.run_completions FOR EACH ROW
  WHEN (NEW.tenant_id = 'falls-back' AND NEW.mode = 'atomic') EXECUTE FUNCTION governance.refuse();
""" + "".join(
    f"ALTER TABLE governance.{table} ADD CONSTRAINT no_curse CHECK (tenant_id <> 'failing.{table}');"
    for table in FAILING_TABLES
)


@dataclass(slots=True)
class Monitored:
    """The Prometheus server, and the worker's own metrics page."""

    prometheus: PrometheusServer
    port: int
    idle_port: int  # a worker whose broker has no queue, with the coordinator off
    at: float | None = None  # the time of every query, once everything has happened

    @property
    def worker(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def idle(self) -> str:
        return f"127.0.0.1:{self.idle_port}"

    def scrape(self, accept: str = "text/plain") -> tuple[str, str]:
        """Return the worker's metrics and their content type."""
        response = request_blocking(self.port, "/metrics", headers=f"accept: {accept}\r\n")
        return response.body, response.headers["content-type"]

    def value(self, series: str) -> float:
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.scrape()[0], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def query(self, promql: str) -> dict[str, float]:
        """Return the value of each series, by its instance."""
        return {row["metric"].get("instance", ""): float(row["value"][1]) for row in self.rows(promql)}

    def rows(self, promql: str) -> list[dict[str, Any]]:
        return self.prometheus.query(promql, at=self.at)

    def is_at_rest(self) -> bool:
        """Query the two workers as of some seconds ago; if both were scraped and at rest, all tests query that time.

        If a scrape fails on a busy machine, every series is absent until the next one.
        """
        self.at = time.time() - SCRAPED_SECONDS
        both = {self.worker: 0.0, self.idle: 0.0}
        rest = (
            self.query("up") == {self.worker: 1, self.idle: 1}
            and self.query("closeout_inflight_deliveries") == both
            and self.query("closeout_consumer_paused") == {**both, self.idle: 1}
            and self.query("closeout_outbox_pending") == both
        )
        if not rest:
            self.at = None
        return rest


@contextmanager
def monitored(postgres: PostgresServer, rabbit: RabbitServer, folder: Path, template: str) -> Iterator[Monitored]:
    database = postgres.create_database("monitored", template=template)
    vhost, bare = rabbit.create_vhost("monitored"), rabbit.create_vhost("bare")
    ports = Port(), Port()
    places = [f"127.0.0.1:{port.number}" for port in ports]
    environ = {
        "DATABASE_URL": database,
        "HTTP_HOST": "127.0.0.1",
        "TRANSACTION_COORDINATOR_TENANTS": ",".join(
            ["acme", "falls-back", *(f"failing.{table}" for table in FAILING_TABLES)]
        ),
        "LEGACY_FALLBACK_ENABLED": "true",
        "DELIVERY_MAX_ATTEMPTS": "2",
        "TRUSTED_PUBLISHERS": USER,
    }
    busy = {"AMQP_URL": vhost, "HTTP_PORT": str(ports[0].number), "TRANSACTION_COORDINATOR_ENABLED": "true"}
    idle = {"AMQP_URL": bare, "HTTP_PORT": str(ports[1].number), "TRANSACTION_COORDINATOR_ENABLED": "false"}
    policies = folder / "policies.yaml"
    policies.write_text(SUPPRESS)
    with PrometheusServer(folder / "prometheus", targets={"closeout": places}, rules=[RULES]) as prometheus:
        apply = [CLOSEOUT, "policies", "apply", str(policies)]
        subprocess.run(apply, env={**os.environ, **environ, **busy}, check=True, stdout=subprocess.DEVNULL)
        log = (folder / "workers.log").open("ab")
        workers = [
            subprocess.Popen([CLOSEOUT, "worker"], env={**os.environ, **environ, **own}, stderr=log)
            for own in (idle, busy)
        ]
        try:
            seen = Monitored(prometheus, ports[0].number, ports[1].number)
            asyncio.run(_everything(seen, postgres, rabbit, vhost))
            yield seen
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            log.close()
            # pytest shows it only where a test fails.
            print(*(folder / "workers.log").read_text().splitlines()[-80:], sep="\n")  # noqa: T201
            for name in ("monitored", "bare"):
                rabbit.delete_vhost(name)
            postgres.drop_database("monitored")


async def _everything(seen: Monitored, postgres: PostgresServer, rabbit: RabbitServer, vhost: str) -> None:
    """Let the worker do everything that has a metric, each scraped by Prometheus before the next."""
    await _seen(lambda: seen.query("closeout_consumer_paused").get(seen.worker) == 1)  # the queue does not exist yet
    broker = BrokerConnection(vhost, name="runner")
    await declare(broker)
    conn = await asyncpg.connect(postgres.url("monitored"))
    try:
        await conn.execute(FAULTS)
        await _seen(lambda: seen.query("closeout_consumer_paused").get(seen.worker) == 0)
        # First, because the relay takes longest: events that cannot be published.
        await _exchange(vhost, exists=False)
        await publish(broker, *[runs.body() for _ in range(KEPT_BACK)], user_id=USER)
        await _seen(lambda: set(seen.query("closeout_outbox_oldest_seconds > 1")) == {seen.worker, seen.idle})
        await _exchange(vhost, exists=True)
        await _runs_of_every_kind(broker)
        await _seen(lambda: seen.value('closeout_parked_total{reason="attempts_exhausted"}') >= len(FAILING_TABLES))
        await _interrupted(seen, rabbit, broker, conn)
        await _seen(lambda: seen.value('closeout_deliveries_total{result="committed"}') >= 220 + 2 * PREFETCH)
        # As seen by Prometheus, which lags behind the worker, so that tests see the final state.
        await _seen(seen.is_at_rest)
    finally:
        await conn.close()
        await broker.close()


async def _runs_of_every_kind(broker: BrokerConnection) -> None:
    twice = runs.message()
    await publish(broker, *[runs.body() for _ in range(200)], user_id=USER)
    for field, value in (("tenant_id", "by-hand"), ("tenant_id", "falls-back"), ("model", "suppressed"),
                         ("model", "flagged"), ("model", "odd")):  # fmt: skip
        await publish(broker, *[runs.body(runs.message(**{field: value})) for _ in range(5)], user_id=USER)
    await publish(broker, runs.body(twice), runs.body(twice), runs.body({**twice, "model": "other"}), user_id=USER)
    bad = b"{nonsense", runs.body(status="done"), runs.body(schema_version=2), runs.body(error_message="x" * 1_100_000)
    await publish(broker, *bad, user_id=USER)
    await publish(broker, runs.body(), user_id=USER, content_encoding="br")
    await publish(broker, *[runs.body(runs.message(**{field: [1]})) for field in ADJUSTABLE_FIELDS], user_id=USER)
    await publish(broker, runs.body())  # without a user_id
    for table in FAILING_TABLES:
        await publish(broker, runs.body(tenant_id=f"failing.{table}"), user_id=USER)  # retried after ten seconds
        tried = {"x-closeout-attempts": 1}
        await publish(broker, runs.body(tenant_id=f"failing.{table}"), user_id=USER, headers=tried)


async def _interrupted(
    seen: Monitored, rabbit: RabbitServer, broker: BrokerConnection, conn: asyncpg.Connection
) -> None:
    """Block the worker's transactions, fill its prefetch, then close its connections."""
    async with conn.transaction():
        await conn.execute("LOCK TABLE governance.incidents IN ACCESS EXCLUSIVE MODE")
        await publish(broker, *[runs.body() for _ in range(2 * PREFETCH)], user_id=USER)
        await _seen(lambda: seen.query("closeout_inflight_deliveries").get(seen.worker) == PREFETCH)
        await asyncio.to_thread(rabbit.eval, 'rabbit_networking:close_all_connections(<<"maintenance">>)')
        await _seen(lambda: seen.query("closeout_consumer_paused").get(seen.worker) == 1)


async def _exchange(vhost: str, *, exists: bool) -> None:
    def change() -> None:
        with pika.BlockingConnection(pika.URLParameters(vhost)) as connection:
            channel = connection.channel()
            if exists:
                channel.exchange_declare(EVENTS_EXCHANGE, exchange_type="topic", durable=True)
            else:
                channel.exchange_delete(EVENTS_EXCHANGE)

    await asyncio.to_thread(change)


async def _seen(check: Callable[[], bool]) -> None:
    """Wait until *check*, which blocks, is true; a worker that does not listen yet counts as false."""
    await until(
        lambda: asyncio.to_thread(check), every=0.1, what="what Prometheus and the worker are to show", ignoring=OSError
    )
