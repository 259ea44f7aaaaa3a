"""Every message is closed out or parked with a reason; the worker neither ends nor stalls nor leaks."""

import asyncio
import json
import random
from collections import Counter
from copy import deepcopy

import pytest
from sqlalchemy import func, select

from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import decode
from consumer.parked.copies import headers_of
from domains import tables
from tests.support import run_messages as runs
from tests.support.traffic import emptied, publish, worker
from tests.support.waiting import until

SEED = 20261101
# From JSON test suites: each is invalid JSON, or valid JSON that is not a message.
TORTURE = [
    b"", b" ", b"{", b"}", b"[]", b"[1,]", b'{"a":}', b"{'a':1}", b'{"a":1,}', b'{"a":1}}', b"nul", b"NaN",
    b"-Infinity", b"01",
    b"1.", b".1", b"1e", b"+1", b"0x1", b'"', b'"\\', b'"\\u"', b'"\\u12"', b'"\\ud800"', b'"\\udc00\\ud800"',
    b'"\x00"', b'"\x1f"', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"[" * 100_000, b'{"a":' * 50_000, b"[" * 1000 + b"]" * 1000, b'{"a":1' + b',"a":1' * 20_000 + b"}", b"9" * 10_000,
    b"-" + b"9" * 10_000, b"1e" + b"9" * 1000, b'{"\\u0000":1}', b'{"":1}', b"/**/{}", b"{} {}", b"\x00" * 1000,
]  # fmt: skip
VALUES: list[object] = [
    None,
    True,
    0,
    -1,
    2**63,
    2**64,
    1e308,
    "",
    "x" * 5000,
    "\0",
    "\ud83d\ude00",
    [],
    {},
    [[]],
    {"a": {}},
    "NaN",
    -0.0,
]


def mutated(source: random.Random) -> bytes:
    """Return a valid message with a few fields or bytes changed at random."""
    fields = runs.message(run_id=str(source.getrandbits(128).to_bytes(16).hex()))
    for _ in range(source.randint(0, 3)):
        name = source.choice([*fields, "unknown"])
        match source.randint(0, 3):
            case 0:
                fields.pop(name, None)
            case 1:
                fields[name] = deepcopy(source.choice(VALUES))
            case 2 if isinstance(fields.get("usage"), dict):
                fields["usage"][source.choice(["cost_usd", "input_tokens", "output_tokens"])] = deepcopy(
                    source.choice(VALUES)
                )
            case _ if (
                isinstance(fields.get("steps"), list) and fields["steps"] and isinstance(fields["steps"][0], dict)
            ):
                fields["steps"][0][source.choice(["index", "status", "duration_ms", "cost_usd"])] = deepcopy(
                    source.choice(VALUES)
                )
    body = bytearray(json.dumps(fields).encode())
    for _ in range(source.choice([0, 0, 0, 1, 2, 8])):
        body[source.randrange(len(body))] = source.randrange(256)
    return bytes(body)


def test_twenty_thousand_mutated_messages_are_decoded_or_refused_with_a_reason():
    source = random.Random(SEED)  # noqa: S311 - for variety
    outcomes: Counter[str] = Counter()
    for _ in range(20_000):
        reason = _reason(mutated(source))
        outcomes[reason or "accepted"] += 1
    assert outcomes["accepted"] > 1_000
    assert set(outcomes) == {"accepted", "invalid_json", "schema_violation", "unsupported_schema_version"}


@pytest.mark.parametrize("body", TORTURE, ids=lambda body: repr(body[:16]))
def test_each_of_the_torture_bodies_is_refused(body):
    with pytest.raises(MessageRefusedError):
        decode(body, max_bytes=1_048_576)


async def test_a_worker_closes_out_or_parks_every_one_of_thousands_of_mutated_messages(
    database_url, amqp_url, engine, broker
):
    source = random.Random(SEED)  # noqa: S311 - for variety
    bodies = [
        *TORTURE,
        b"x" * 1_200_000,
        runs.body(error_message="y" * 1_040_000),
        *(mutated(source) for _ in range(2_500)),
    ]
    async with worker(database_url, amqp_url) as service:
        await asyncio.gather(*(publish(broker, *bodies[start::20]) for start in range(20)))
        registry = service.worker._settler._metrics.registry

        def settled(*results: str) -> float:
            found = (registry.get_sample_value("closeout_deliveries_total", {"result": result}) for result in results)
            return sum(value or 0.0 for value in found)

        await until(lambda: settled("committed", "duplicate", "parked") >= len(bodies), within=100)
        assert settled("retried", "requeued") == 0
        assert registry.get_sample_value("closeout_inflight_deliveries") == 0
        await publish(broker, runs.body(tenant_id="after-all-that"))
        await until(lambda: settled("committed", "duplicate", "parked") > len(bodies))
    parked = await emptied(broker, "closeout.parked")
    assert all(headers_of(message)["x-closeout-error"] for message in parked)
    refused = [
        message.body for message in parked if headers_of(message)["x-closeout-reason"] != "conflicting_duplicate"
    ]
    assert sorted(refused) == sorted(body for body in bodies if _reason(body))
    # A mutation may give several messages one run id.
    keys = {decode(body, max_bytes=1_048_576).run.key for body in bodies if not _reason(body)}
    async with engine.connect() as conn:
        stored = (await conn.execute(select(func.count()).select_from(tables.run_completions))).scalar_one()
    assert stored == len(keys) + 1


def _reason(body: bytes) -> str | None:
    try:
        decode(body, max_bytes=1_048_576)
    except MessageRefusedError as error:
        return error.reason if str(error) else "no words"
    return None
