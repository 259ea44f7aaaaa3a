"""``closeout outbox``: the backlog is counted, explained, and published on request, next to live relays."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.metrics import Metrics
from consumer.outbox import store as outbox
from consumer.outbox.backlog import COUNTED_RUNS_MAX, BacklogState, count_pending, read_backlog
from consumer.outbox.drain import Drained, drain
from consumer.outbox.publisher import EventPublisher
from consumer.outbox.relay import GRACE_SECONDS, RUNS_A_SWEEP
from domains.run import RunKey
from tests.support import run_messages as runs
from tests.support.broken_writes import count
from tests.support.command_line import closeout, on_a_terminal, plain
from tests.support.traffic import listen, received, worker

TYPES = ["incident.created", "policy.evaluated", "run.finalized"]


async def commit(engine: AsyncEngine, number: int, *, age: str = "0 s", **changes: object) -> list[str]:
    """Commit runs of a given age without publishing their events; return their ids."""
    made = [runs.run(**changes) for _ in range(number)]
    await create_transaction_coordinator(engine=engine).execute_many(made)
    ids = [str(run.run_id) for run in made]
    async with engine.begin() as conn:
        await conn.execute(
            text(
                f"UPDATE governance.outbox_events SET created_at = created_at - interval '{age}' "
                "WHERE run_id = ANY(CAST(:ids AS uuid[]))"
            ),
            {"ids": ids},
        )
    return ids


async def drained(engine: AsyncEngine, broker: BrokerConnection, *, required: bool = False, **options) -> Drained:
    channel = ConfirmedChannel(broker)
    publisher = EventPublisher(channel, metrics=Metrics(), require_subscribers=required)
    return await drain(engine, publisher, reachable=channel.opened, **options)


@asynccontextmanager
async def held_by_a_relay(engine: AsyncEngine, number: int):
    """Lock the oldest runs as a live relay does while it waits for confirms."""
    async with engine.begin() as conn:
        yield list(await conn.execute(outbox.stale_runs(0, number)))


async def test_an_empty_outbox_is_reported_and_exits_0(database_url):
    done = await closeout("outbox", "status", DATABASE_URL=database_url)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no unpublished events",
        "meaning: RabbitMQ has confirmed every committed event",
    ]


async def test_events_set_aside_are_reported_with_the_reason_and_drained_on_request(engine, database_url, amqp_url):
    await commit(engine, 2, age="2 min")
    await commit(engine, 1)
    async with engine.begin() as conn:
        found = [RunKey(row.tenant_id, row.run_id) for row in await conn.execute(outbox.stale_runs(60, 10))]
        await outbox.set_aside(conn, dict.fromkeys(found, "access to topic refused"))

    status = await closeout("outbox", "status", DATABASE_URL=database_url)
    as_json = await closeout("outbox", "status", "--json", DATABASE_URL=database_url)
    doctor = await closeout("doctor", DATABASE_URL=database_url, AMQP_URL=amqp_url)

    assert status.returncode == 1
    assert "1 run has 3 unpublished events" in status.stdout
    assert "set aside: 2 runs: access to topic refused" in status.stdout
    assert json.loads(as_json.stdout)["set_aside"] == {"access to topic refused": 2}
    assert "events of 2 runs are set aside: access to topic refused" in " ".join(doctor.stdout.split())
    async with engine.connect() as conn:
        assert (await count_pending(conn))[::2] == (3, 2)

    drained = await closeout("outbox", "drain", DATABASE_URL=database_url, AMQP_URL=amqp_url)

    assert drained.returncode == 0, drained.stderr
    assert await count(engine, "outbox_events") == 0


@pytest.mark.parametrize(
    ("age", "state", "status", "words"),
    [
        ("0 s", "normal", 0, "meaning: normal"),
        (f"{GRACE_SECONDS + 9} s", "late", 0, "to do: check again in a minute"),
        ("2 min", "stale", 1, "publish the events now with closeout outbox drain"),
    ],
)
async def test_the_age_of_the_oldest_event_decides_the_verdict_and_exit_status(
    engine, database_url, age, state, status, words
):
    await commit(engine, 1, age=age)

    output = await closeout("outbox", "status", DATABASE_URL=database_url)
    plainly = await closeout("outbox", "status", "--json", DATABASE_URL=database_url)

    assert output.returncode == plainly.returncode == status
    assert words in output.stdout
    assert json.loads(plainly.stdout)["state"] == state


async def test_status_counts_by_tenant_and_type_with_the_oldest_first(engine, database_url):
    await commit(engine, 3, age="50 min", tenant_id="young")
    await commit(engine, 2, age="2 h", tenant_id="old")
    async with engine.begin() as conn:  # the first event of one run was published
        await conn.execute(
            text(
                "DELETE FROM governance.outbox_events WHERE sequence = 1 AND run_id = "
                "(SELECT run_id FROM governance.outbox_events WHERE tenant_id = 'old' LIMIT 1)"
            )
        )

    found = json.loads((await closeout("outbox", "status", "--json", DATABASE_URL=database_url)).stdout)
    output = (await closeout("outbox", "status", DATABASE_URL=database_url)).stdout

    assert (found["all"]["runs"], found["all"]["events"], found["complete"]) == (5, 14, True)
    assert 7200 <= found["all"]["oldest_seconds"] < 7300
    assert [(name, share["runs"], share["events"]) for name, share in found["by_tenant"].items()] == [
        ("old", 2, 5),
        ("young", 3, 9),
    ]
    assert {name: share["events"] for name, share in found["by_type"].items()} == dict(
        zip(TYPES, (4, 5, 5), strict=True)
    )
    assert "5 runs have 14 unpublished events, the oldest for 2 h" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["young", "3", "9", "50", "min"] in rows


async def test_the_stale_threshold_can_be_changed(engine, database_url):
    await commit(engine, 1, age="2 min")

    assert (await closeout("outbox", "status", "--older-than", "5m", DATABASE_URL=database_url)).returncode == 0
    assert (await closeout("outbox", "status", "--older-than", "soon", DATABASE_URL=database_url)).returncode == 2


async def test_counting_stops_at_a_limit_and_reports_it(engine):
    await commit(engine, 5, age="1 min")
    async with engine.connect() as conn:
        some, every = await read_backlog(conn, at_most=3), await read_backlog(conn)

    assert (some.all.runs, some.complete, some.state()) == (3, False, BacklogState.STALE)
    assert (every.all.runs, every.complete) == (5, True)


async def test_counting_reads_the_oldest_events_through_the_index(engine):
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.outbox_events SELECT 't', gen_random_uuid(), 3, gen_random_uuid(), 'x', 'x', "
                "'{}', now() - make_interval(secs => n) FROM generate_series(1, 20000) n"
            )
        )
        await conn.execute(text("ANALYZE governance.outbox_events"))
    before = await _scans(engine)
    async with engine.connect() as conn:
        assert (await read_backlog(conn, at_most=10)).all.runs == 10
        await conn.execute(text("SELECT pg_stat_force_next_flush()"))

    assert await _scans(engine) == before
    assert COUNTED_RUNS_MAX > 20000


async def test_drain_publishes_all_events_in_order_and_waits_for_recent_ones(engine, database_url, broker, amqp_url):
    ids = await commit(engine, 20, age="1 min") + await commit(engine, 5)
    events = await listen(broker)

    done = await closeout("outbox", "drain", DATABASE_URL=database_url, AMQP_URL=amqp_url)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "75 events of 25 runs published and confirmed\n"
    assert await count(engine, "outbox_events") == 0
    await received(events, 75)
    for run_id in ids:
        mine = [e.header.properties for e in events if e.header.properties.correlation_id == run_id]
        assert [properties.message_type for properties in mine] == TYPES


async def test_drain_older_than_decides_which_events_are_published(engine, database_url, broker, amqp_url):
    await commit(engine, 3, age="1 min")
    await commit(engine, 2)
    urls = {"DATABASE_URL": database_url, "AMQP_URL": amqp_url}

    first = json.loads((await closeout("outbox", "drain", "--older-than", "30s", "--json", **urls)).stdout)
    assert first == {"runs": 3, "events": 9, "left": 0, "reasons": []}
    second = json.loads((await closeout("outbox", "drain", "--older-than", "0s", "--json", **urls)).stdout)
    assert second == {"runs": 2, "events": 6, "left": 0, "reasons": []}


async def test_drain_continues_over_many_sweeps_and_reports_progress(engine, broker):
    await commit(engine, 2 * RUNS_A_SWEEP + 50, age="1 min")
    seen: list[tuple[int, int]] = []

    report = await drained(engine, broker, older_than_seconds=0, progress=lambda *at: seen.append(at))

    assert (report.runs, report.left) == (450, 0)
    assert seen == [(200, 450), (400, 450), (450, 450)]


async def test_drain_shows_its_progress_on_a_terminal(engine, database_url, broker, amqp_url):
    await commit(engine, 300, age="1 min")

    status, written = await on_a_terminal(
        "outbox", "drain", "--older-than", "1s", DATABASE_URL=database_url, AMQP_URL=amqp_url
    )

    assert status == 0, written
    assert "publishing runs' events" in plain(written)
    assert "900 events of 300 runs published and confirmed" in plain(written)


async def test_drain_without_a_broker_keeps_every_event_and_exits_1(engine, database_url):
    await commit(engine, 500, age="1 min")

    done = await closeout("outbox", "drain", DATABASE_URL=database_url, AMQP_URL="amqp://u:p@127.0.0.1:1/")

    assert done.returncode == 1
    assert "0 events of 0 runs" in done.stdout
    assert "500 runs still have unpublished events: RabbitMQ is not available" in done.stderr
    assert await count(engine, "outbox_events") == 1500


async def test_drain_keeps_and_names_unroutable_events_and_publishes_the_rest(engine, database_url, broker, amqp_url):
    await commit(engine, RUNS_A_SWEEP + 10, age="2 min", error_code="AGENT_CRASH")  # critical: no queue is bound
    await commit(engine, 30, age="1 min")
    channel = await broker.channel(confirms=False)
    queue = (await channel.queue_declare("", exclusive=True)).queue or ""
    for key in ("incident.created.high", "policy.#", "run.#"):
        await channel.queue_bind(queue, "governance.events", routing_key=key)

    done = await closeout(
        "outbox", "drain", "--json", "--older-than", "30s",
        DATABASE_URL=database_url, AMQP_URL=amqp_url, REQUIRE_EVENT_SUBSCRIBERS="true",
    )  # fmt: skip

    assert done.returncode == 1
    assert "210 runs still have unpublished events: no queue is bound for incident.created.critical" in done.stderr
    output = json.loads(done.stdout)
    assert (output["runs"], output["left"]) == (30, 210)
    assert await count(engine, "outbox_events") == 3 * 210


async def test_drain_skips_and_reports_events_locked_by_a_relay(engine, broker):
    await commit(engine, 10, age="1 min")
    events = await listen(broker)
    async with held_by_a_relay(engine, 4) as held:
        report = await drained(engine, broker, older_than_seconds=0)

    assert len(held) == 4
    assert (report.runs, report.left, report.reasons) == (6, 4, [])
    output = {e.header.properties.correlation_id for e in await received(events, 18)}
    assert not {str(row.run_id) for row in held} & output


async def test_concurrent_drains_and_a_worker_publish_every_event_once(
    engine, database_url, broker, amqp_url, bare_amqp_url
):
    ids = await commit(engine, 600, age="1 min")
    events = await listen(broker)
    others = [BrokerConnection(bare_amqp_url, name=f"drain {n}") for n in range(2)]

    async with worker(database_url, amqp_url):
        reports = await asyncio.gather(*(drained(engine, other) for other in others))

    assert [report.left for report in reports] == [0, 0]
    assert await count(engine, "outbox_events") == 0
    await received(events, 1800)
    assert sorted(str(e.header.properties.correlation_id) for e in events) == sorted(ids * 3)
    for other in others:
        await other.close()


async def test_drain_leaves_events_committed_meanwhile_to_their_worker(engine, broker):
    await commit(engine, RUNS_A_SWEEP + 1, age="1 min")
    more: list[asyncio.Task[list[str]]] = []

    def commit_more(_done: int, _total: int) -> None:
        more.append(asyncio.get_running_loop().create_task(commit(engine, 1)))

    report = await drained(engine, broker, older_than_seconds=0, progress=commit_more)

    await asyncio.gather(*more)
    assert (report.runs, report.left) == (RUNS_A_SWEEP + 1, 0)
    assert await count(engine, "outbox_events") == 3 * len(more)


async def _scans(engine: AsyncEngine) -> int:
    async with engine.connect() as conn:
        found = await conn.execute(text("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'outbox_events'"))
        return int(found.scalar_one())
