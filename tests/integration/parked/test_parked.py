"""``closeout parked``: parked messages are listed, replayed or discarded, and never lost."""

import asyncio
import itertools
import json
import re
from base64 import b64decode
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiormq import spec
from servers import RabbitServer
from sqlalchemy import text

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.commands.output import printable
from consumer.commands.parked_view import format_body
from consumer.errors import UnavailableError
from consumer.parked.copies import headers_of
from consumer.parked.operations import Filters, discard, find, replay
from tests.support import run_messages as runs
from tests.support.command_line import closeout_blocking
from tests.support.roles import OPERATOR_USER, as_user, permit
from tests.support.traffic import emptied, eventually, has_length, parked, publish, published_runs, worker
from tests.support.waiting import PATIENCE, until

EVERYTHING = Filters()
_names = itertools.count()


@pytest.fixture
async def any_broker(any_rabbit: RabbitServer) -> AsyncIterator[BrokerConnection]:
    vhost = f"parked{next(_names)}"
    made = BrokerConnection(any_rabbit.create_vhost(vhost), name="tests")
    permit(any_rabbit, vhost, OPERATOR_USER)
    await declare(made)
    yield made
    await made.close()
    any_rabbit.delete_vhost(vhost)


def closeout(amqp_url: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    done = closeout_blocking("parked", *arguments, AMQP_URL=amqp_url)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


async def printed(amqp_url: str, *arguments: str, status: int = 0) -> str:
    return (await asyncio.to_thread(closeout, amqp_url, *arguments, status=status))[0]


async def put(broker: BrokerConnection, body: bytes, *, ago: timedelta = timedelta(0), **more: Any) -> None:
    """Park *body* as a worker does, with a given age."""
    headers = {
        "x-closeout-reason": more.pop("reason", "attempts_exhausted"),
        "x-closeout-error": more.pop("error", "it did not work"),
        "x-closeout-attempts": 5,
        "x-closeout-parked-at": (datetime.now(UTC) - ago).isoformat(),
        "x-closeout-exchange": "runs",
        "x-closeout-routing-key": "run.completed",
        **more.pop("headers", {}),
    }
    properties = spec.Basic.Properties(headers=headers, delivery_mode=2, **more)
    await ConfirmedChannel(broker).send(exchange="", routing_key="closeout.parked", body=body, properties=properties)


def senders_headers(message: Any) -> dict[str, Any]:
    """Return the message's headers without the one that the broker adds on delivery."""
    return {name: value for name, value in headers_of(message).items() if name != "x-delivery-count"}


async def bodies_in_order(broker: BrokerConnection) -> list[bytes]:
    held: list[Any] = []
    await find(broker, EVERYTHING, rows=10_000, bodies=held)
    return [message.body for _, message in held]


async def test_a_replay_closes_out_the_run_once_the_cause_is_fixed(
    database_url, amqp_url, bare_amqp_url, rabbit, engine, broker
):
    vhost = bare_amqp_url.rsplit("/", 1)[1]
    runner = BrokerConnection(rabbit.add_user(f"sender-{vhost}", "pw", "^$", ".*", ".*", vhost), name="runner")
    # A replay carries the operator's user id, which must be trusted.
    trusted = f"sender-{vhost},{OPERATOR_USER}"
    async with engine.begin() as conn:
        await conn.execute(text("ALTER TABLE governance.incidents ADD CONSTRAINT no_b CHECK (tenant_id <> 'b')"))
    async with worker(database_url, amqp_url, DELIVERY_MAX_ATTEMPTS="1", TRUSTED_PUBLISHERS=trusted):
        await publish(
            runner,
            runs.body(tenant_id="b"),
            user_id=f"sender-{vhost}",
            expiration="600000",
            headers={"CC": ["nowhere"]},
        )
        await until(lambda: has_length(broker, "closeout.parked", 1))
        async with engine.begin() as conn:
            await conn.execute(text("ALTER TABLE governance.incidents DROP CONSTRAINT no_b"))
        operators = as_user(amqp_url, OPERATOR_USER)
        assert "1 replayed and confirmed: attempts_exhausted 1" in await printed(operators, "replay", "--tenant", "b")
        await eventually(engine, published_runs(), 1)
    assert await emptied(broker, "closeout.parked") == []
    await runner.close()


async def test_a_replayed_message_has_only_the_senders_headers(amqp_url, broker):
    await put(
        broker,
        b"{}",
        headers={
            "x-closeout-user-id": "somebody",
            "x-closeout-expiration": "1",
            "x-closeout-cc": ["closeout.parked"],
            "CC": ["closeout.parked"],
            "x-death": [{"count": 1, "queue": "q"}],
            "x-first-death-queue": "q",
            "traceparent": "00-x",
        },
        message_id="m",
        priority=4,
        correlation_id="c",
        content_type="application/json",
    )
    await find(broker, EVERYTHING, rows=1)  # so that the broker counts a delivery
    report = await replay(broker, EVERYTHING, rows=1)
    assert (report.count, report.failure) == (1, None)
    (message,) = await emptied(broker, "closeout.run-completed")
    properties = message.header.properties
    assert senders_headers(message) == {"traceparent": "00-x"}
    assert (properties.message_id, properties.priority, properties.correlation_id) == ("m", 4, "c")
    assert (properties.user_id, properties.expiration, properties.delivery_mode) == ("closeout", None, 2)
    assert (message.exchange, message.routing_key) == ("runs", "run.completed")


@pytest.mark.parametrize(
    ("origin", "named", "arrives"),
    [
        ({"x-closeout-exchange": ""}, [], "closeout.run-completed"),
        ({"x-closeout-exchange": "governance.events"}, [], "closeout.run-completed"),  # forged by its sender
        ({"x-closeout-exchange": "other", "x-closeout-routing-key": "k"}, ["other"], "others"),
        ({"x-closeout-routing-key": "nobody.listens"}, [], "closeout.run-completed"),
        ({"x-closeout-exchange": 5, "x-closeout-routing-key": None}, [], "closeout.run-completed"),
    ],
)
async def test_a_message_is_replayed_to_its_source_exchange_if_that_is_trusted(broker, origin, named, arrives):
    channel = await broker.channel(confirms=False)
    await channel.exchange_declare("other", exchange_type="direct")
    await channel.queue_declare("others")
    await channel.queue_bind("others", "other", routing_key="k")
    await put(broker, b"{}", headers=origin)
    assert (await replay(broker, EVERYTHING, rows=1, exchanges=frozenset(named))).count == 1
    assert len(await emptied(broker, arrives)) == 1


async def test_an_unroutable_replay_keeps_the_message_parked_and_exits_1(amqp_url, broker):
    channel = await broker.channel(confirms=False)
    await channel.queue_unbind("closeout.run-completed", "runs", routing_key="run.completed")
    for _ in range(40):
        await put(broker, b"{}")
    out, err = await asyncio.to_thread(closeout, amqp_url, "replay", status=1)
    assert "0 replayed" in out
    assert "no queue accepted" in err
    assert len(await emptied(broker, "closeout.parked")) == 40


async def test_a_header_that_cannot_be_encoded_keeps_only_its_message_parked(broker, monkeypatch):
    for number in range(3):
        await put(broker, str(number).encode(), headers={"odd": number == 1})
    encode = spec.Basic.Properties.marshal

    def refuses(properties: spec.Basic.Properties) -> bytes:
        if (properties.headers or {}).get("odd"):
            raise TypeError("Unknown type")
        return encode(properties)

    with monkeypatch.context() as patch:
        patch.setattr(spec.Basic.Properties, "marshal", refuses)
        report = await replay(broker, EVERYTHING, rows=5)
    assert (report.count, report.failed) == (2, 1)
    assert await bodies_in_order(broker) == [b"1"]


async def test_a_crash_between_confirm_and_ack_leaves_the_message_in_both_places(any_broker, monkeypatch):
    await put(any_broker, b"1")
    await put(any_broker, b"2")

    async def dies(*_: object, **__: object) -> None:
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr("aiormq.channel.Channel.basic_ack", dies)
        with pytest.raises(SystemError):
            await replay(any_broker, EVERYTHING, rows=1)
    await until(lambda: has_length(any_broker, "closeout.parked", 2))
    assert sorted(await bodies_in_order(any_broker)) == [b"1", b"2"]
    assert sorted(m.body for m in await emptied(any_broker, "closeout.run-completed")) == [b"1", b"2"]


async def test_messages_of_untrusted_publishers_are_replayed_only_with_an_explicit_reason(amqp_url, broker):
    await put(broker, b"{}", reason="untrusted_publisher")
    out, err = await asyncio.to_thread(closeout, amqp_url, "replay", status=1)
    assert "0 replayed" in out
    assert "--reason untrusted_publisher" in err
    assert "1 replayed" in await printed(amqp_url, "replay", "--reason", "untrusted_publisher")


async def test_listing_thirty_times_loses_nothing_and_keeps_the_order(any_broker):
    bodies = [str(number).encode() for number in range(100)]
    for body in bodies:
        await put(any_broker, body)
    for _ in range(30):
        report = await find(any_broker, EVERYTHING, rows=5)
        assert (report.count, report.visited, report.expected) == (100, 100, 100)
    assert await bodies_in_order(any_broker) == bodies
    assert [m.body for m in await emptied(any_broker, "closeout.parked")] == bodies


async def test_discarding_some_keeps_the_others_in_order(any_broker):
    for number in range(100):
        await put(any_broker, str(number).encode(), reason="too_large" if number % 3 else "invalid_json")
    report = await discard(any_broker, Filters(reason="invalid_json"), rows=5, limit=20)
    assert (report.count, len(report.rows)) == (20, 5)
    left = [m.body for m in await emptied(any_broker, "closeout.parked")]
    assert left == [str(n).encode() for n in range(100) if n % 3 or n >= 60]


async def test_a_listing_that_crashes_returns_every_message(any_broker):
    for number in range(40):
        await put(any_broker, str(number).encode())

    def dies(seen: int, total: int) -> None:
        raise SystemError(seen, total)

    with pytest.raises(SystemError):
        await find(any_broker, EVERYTHING, rows=1, progress=dies)
    await until(lambda: has_length(any_broker, "closeout.parked", 40))
    assert len(await bodies_in_order(any_broker)) == 40


async def test_a_worker_parks_messages_while_they_are_listed(database_url, amqp_url, broker):
    for number in range(200):
        await put(broker, str(number).encode())
    async with worker(database_url, amqp_url):
        await asyncio.gather(
            *(publish(broker, b"{bad") for _ in range(50)), *[_look_repeatedly(broker) for _ in range(1)]
        )
        found = await parked(broker, 250)
    assert [m.body for m in found].count(b"{bad") == 50


async def test_concurrent_listings_report_the_messages_they_could_not_see(broker):
    for number in range(300):
        await put(broker, str(number).encode())
    channel = await broker.channel(confirms=False)
    await channel.basic_qos(prefetch_count=1)
    got = asyncio.Event()

    async def hold(_: object) -> None:
        got.set()

    await channel.basic_consume("closeout.parked", hold)
    await asyncio.wait_for(got.wait(), PATIENCE)
    with pytest.raises(UnavailableError, match="another consumer"):
        await find(broker, EVERYTHING, rows=1)
    await channel.close()
    assert (await find(broker, EVERYTHING, rows=1)).count == 300


async def test_a_message_is_chosen_only_if_all_filters_match(broker):
    mine = runs.message(tenant_id="mine")
    run = mine["run_id"]
    await put(broker, runs.body(mine), reason="conflicting_duplicate", message_id="a", ago=timedelta(hours=3))
    await put(broker, runs.body(tenant_id="mine"), message_id="b", ago=timedelta(minutes=5))
    await put(broker, b"[not json", reason="invalid_json", message_id="c", ago=timedelta(days=9))
    channel = ConfirmedChannel(broker)
    await channel.send(
        exchange="", routing_key="closeout.parked", body=b"{}", properties=spec.Basic.Properties(message_id="d")
    )
    now = datetime.now(UTC)
    for filters, expected in [
        (EVERYTHING, "abcd"),
        (Filters(tenant="mine"), "ab"),
        (Filters(reason="invalid_json"), "c"),
        (Filters(run=run), "a"),
        (Filters(run=f"mine/{run}"), "a"),
        (Filters(run=f"other/{run}"), ""),
        (Filters(message_id="b"), "b"),
        (Filters(parked_before=now - timedelta(hours=1)), "ac"),
        (Filters(parked_after=now - timedelta(hours=4)), "ab"),
        (Filters(parked_before=now - timedelta(hours=1), parked_after=now - timedelta(days=1)), "a"),
        (Filters(tenant="mine", reason="invalid_json"), ""),
        (Filters(selector="4"), "d"),
        (Filters(selector=f"mine/{run}"), "a"),
    ]:
        report = await find(broker, filters, rows=10)
        assert "".join(m.message_id or "" for m in report.rows) == expected, filters


async def test_list_counts_by_reason_and_prints_json(amqp_url, broker):
    for number in range(3):
        await put(broker, runs.body(tenant_id="t"), reason="too_large" if number else "invalid_json")
    output = await printed(amqp_url, "list", "--limit", "1")
    assert "and 2 more" in output
    assert "3 parked: too_large 2, invalid_json 1" in output
    found = json.loads(await printed(amqp_url, "list", "--reason", "too_large", "--json"))
    assert found["by_reason"] == {"too_large": 2}
    assert [m["position"] for m in found["messages"]] == [2, 3]
    assert found["messages"][0]["tenant_id"] == "t"
    for nonsense in ("soon", "5", "-1d", "999999d"):  # the last is before the year 1
        _, complaint = await asyncio.to_thread(closeout, amqp_url, "list", f"--older-than={nonsense}", status=2)
        assert "--older-than: found" in complaint
    await printed(amqp_url, "list", "--reason", "bad luck", status=2)


async def test_a_dry_run_changes_nothing(amqp_url, broker):
    bodies = [b"1", b"2", b"3"]
    for body in bodies:
        await put(broker, body)
    assert "3 would be replayed" in await printed(amqp_url, "replay", "--dry-run")
    assert "2 would be discarded" in await printed(amqp_url, "discard", "--all", "--limit", "2", "--dry-run")
    assert await bodies_in_order(broker) == bodies
    assert await emptied(broker, "closeout.run-completed") == []


async def test_discard_needs_a_filter_and_confirmation_and_dumps_what_it_removes(amqp_url, broker, tmp_path):
    await put(
        broker,
        b"\xff\x00",
        reason="invalid_json",
        headers={"n": bytearray(b"\xfe"), "t": {"u": [1, None]}},
        message_id="m",
    )
    await put(broker, b"{}")
    file = tmp_path / "dump.jsonl"
    await printed(amqp_url, "discard", "--yes", status=2)
    await printed(amqp_url, "discard", "--all", status=2)
    output = await printed(amqp_url, "discard", "--reason", "invalid_json", "--yes", "--dump", str(file))
    assert "1 discarded: invalid_json 1" in output
    (line,) = file.read_text().splitlines()
    dumped = json.loads(line)
    assert b64decode(dumped["body_base64"]) == b"\xff\x00"
    assert dumped["headers"]["x-closeout-reason"] == "invalid_json"
    assert dumped["headers"]["t"] == {"u": [1, None]}
    assert dumped["properties"]["message_id"] == "m"
    assert file.stat().st_mode & 0o077 == 0
    await printed(amqp_url, "discard", "--all", "--yes", "--dump", str(file), status=2)  # it would overwrite
    assert await bodies_in_order(broker) == [b"{}"]


async def test_a_message_that_cannot_be_dumped_is_not_discarded(broker):
    await put(broker, b"1")

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    report = await discard(broker, EVERYTHING, rows=1, dump=full)
    assert (report.count, report.failure) == (0, "--dump: [Errno 28] No space left on device")
    assert await bodies_in_order(broker) == [b"1"]


async def test_a_message_parked_after_the_prompt_is_not_discarded(broker):
    await put(broker, b"1")
    found = await find(broker, EVERYTHING, rows=1)
    await put(broker, b"2")
    assert (await discard(broker, EVERYTHING, rows=1, only=found.fingerprints)).count == 1
    assert await bodies_in_order(broker) == [b"2"]


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\x7f[red]"


async def test_hostile_messages_are_shown_without_control_characters(amqp_url, broker):
    bodies = [
        json.dumps({"tenant_id": HOSTILE, "run_id": HOSTILE}, ensure_ascii=False).encode(),
        json.dumps({"tenant_id": HOSTILE}).encode(),
        HOSTILE.encode(),
        b"\xff\xfe\x1b[2J" * 500,
        b"[" * 100_000,
        b"",
        b'{"tenant_id":5,"run_id":[]}',
    ]
    nested: Any = "x"
    for _ in range(100):
        nested = {HOSTILE: nested}
    for body in bodies:
        await put(
            broker,
            body,
            error=HOSTILE,
            message_id=HOSTILE,
            message_type=HOSTILE,
            headers={HOSTILE: HOSTILE, "deep": nested, "when": datetime.now(UTC), "raw": bytearray(b"\x1b\xff")},
        )
    output = [
        await printed(amqp_url, "list"),
        await printed(amqp_url, "list", "--json"),
        await printed(amqp_url, "show", HOSTILE),
    ]
    output += [await printed(amqp_url, "show", str(position)) for position in range(1, len(bodies) + 1)]
    output.append(await printed(amqp_url, "show", "1", "--json"))
    for words in output:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", words)
    assert "\\u001b[2J" in output[0]
    assert "ff fe 1b 5b" in output[6]
    (shown,) = json.loads(output[-1])
    assert shown["headers"][HOSTILE] == HOSTILE
    assert b64decode(shown["body_base64"]) == bodies[0]
    assert await bodies_in_order(broker) == bodies


async def test_show_finds_a_run_and_reports_a_missing_one(amqp_url, broker):
    fields = runs.message(tenant_id="acme")
    await put(broker, runs.body(fields), error="because")
    output = await printed(amqp_url, "show", f"acme/{fields['run_id'].upper()}")
    assert "because" in output
    assert '\n  "tenant_id": "acme",\n' in output
    await printed(amqp_url, "show", "acme/nothing", status=1)


async def test_a_message_dead_lettered_by_rabbitmq_is_listed_and_replayed(amqp_url, broker):
    await publish(broker, b"{}", message_id="m")
    channel = await broker.channel(confirms=False)
    message = await channel.basic_get("closeout.run-completed")
    await channel.basic_reject(message.delivery_tag or 0, requeue=False)
    await until(lambda: has_length(broker, "closeout.parked", 1))
    (found,) = json.loads(await printed(amqp_url, "list", "--json"))["messages"]
    assert (found["reason"], found["message_id"]) == (None, "m")
    assert found["parked_at"]
    assert "rejected" in found["error"]
    assert "1 replayed" in await printed(amqp_url, "replay")
    (message,) = await emptied(broker, "closeout.run-completed")
    assert senders_headers(message) == {}


async def test_a_missing_queue_and_an_unavailable_broker_are_reported(bare_amqp_url):
    _, err = await asyncio.to_thread(closeout, bare_amqp_url, "list", status=1)
    assert "run closeout topology" in err
    _, err = await asyncio.to_thread(closeout, "amqp://u:p@127.0.0.1:1/", "list", status=1)
    assert "RabbitMQ is not available" in err


def test_long_bodies_are_truncated_and_escapes_are_readable():
    assert format_body(b'{"a":1.000000000000000000001}') == '{\n  "a": 1.000000000000000000001\n}'
    assert format_body(b"x" * 30_000).endswith("… and 10,000 more characters (--json has all)")
    assert printable("tab\t\U000e0001") == "tab\\u0009\\U000e0001"


async def _look_repeatedly(broker: BrokerConnection) -> None:
    for _ in range(5):
        assert (await find(broker, EVERYTHING, rows=1)).count >= 200
