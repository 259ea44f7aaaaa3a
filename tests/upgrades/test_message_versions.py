"""The introduction of message version 2: workers that read both, then runners; early messages are replayed."""

import json
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest

import consumer.assembly
from consumer.contract.names import PARKED_QUEUE
from consumer.contract.run_message import Decoded, decode
from tests.support import run_messages as runs
from tests.support.command_line import closeout
from tests.support.faults.invariants import assert_invariants
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario
from tests.support.upgrade_load import FEW, works

pytestmark = pytest.mark.timeout(90)

REASON = "unsupported_schema_version"
PARKED = 'closeout_deliveries_total{result="parked"}'


def version_2() -> bytes:
    """Return a message that is invalid in version 1: the agent is an object."""
    fields = runs.message(schema_version=2, agent={"id": "agent-2", "release": "7"}, agent_id=...)
    return json.dumps(fields, indent=3).encode() + b"\r\n"


def decode_both(body: bytes, **rest: Any) -> Decoded:
    """Read versions 1 and 2, as a later worker will."""
    fields = json.loads(body)
    if fields["schema_version"] != 2:
        return decode(body, **rest)
    agent = fields.pop("agent")
    return decode(json.dumps({**fields, "schema_version": 1, "agent_id": agent["id"]}).encode(), **rest)


async def is_parked_whole(scenario: Scenario, body: bytes) -> None:
    channel = await scenario.broker.channel(confirms=False)
    message = await channel.basic_get(PARKED_QUEUE)
    assert message.body == body
    headers = message.header.properties.headers
    assert headers is not None
    assert headers["x-closeout-reason"] == REASON
    assert headers["x-closeout-error"] == "schema_version: found 2; expected 1"
    await channel.close()
    await scenario.until(partial(_waits, scenario, 1), what="its return")


async def _waits(scenario: Scenario, number: int) -> bool:
    return await scenario.length(PARKED_QUEUE) == number


async def has_parked(scenario: Scenario, worker: RunningWorker, number: int) -> None:
    async def has() -> bool:
        return await worker.metric(PARKED) == number and await scenario.length(PARKED_QUEUE) == 1

    await scenario.until(has, what=f"the message parked {number} times")


async def replay(scenario: Scenario) -> None:
    done = await closeout("parked", "replay", "--reason", REASON, AMQP_URL=scenario.rabbit.url(scenario.vhost))
    assert f"1 replayed and confirmed: {REASON} 1" in done.stdout, done.stderr


async def is_closed_out(scenario: Scenario, body: bytes) -> None:
    async def is_there() -> bool:
        where = f"run_id = '{runs.run_id_of(body)}' AND phase = 'EVENTS_PUBLISHED' AND agent_id = 'agent-2'"
        return await scenario.count("run_completions", where) == 1

    await scenario.until(is_there, what="the close-out of a message of version 2")


async def test_version_2_messages_are_parked_unmodified_until_workers_support_both_versions(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
):
    too_early, in_time = version_2(), version_2()
    async with AsyncExitStack() as stack:
        async with scenario.load(pause=0.1):
            only_1 = await scenario.start(**FEW)
            await works(scenario, only_1)
            await scenario.publish_body(too_early)
            await has_parked(scenario, only_1, 1)
            await is_parked_whole(scenario, too_early)
            await works(scenario, only_1)

            await replay(scenario)
            await has_parked(scenario, only_1, 2)
            await is_parked_whole(scenario, too_early)
            await works(scenario, only_1)

            monkeypatch.setattr(consumer.assembly, "decode", decode_both)
            both = await stack.enter_async_context(scenario.worker(in_process=True, **FEW))
            await works(scenario, only_1, both)
            assert await only_1.stop() == 0
            await replay(scenario)
            await is_closed_out(scenario, too_early)
            await scenario.publish_body(in_time)
            await is_closed_out(scenario, in_time)
            await works(scenario, both)
        await assert_invariants(scenario, both)
