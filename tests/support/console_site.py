"""Pages of the console as a client receives them, and runs with hostile text."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.amqp.connection import BrokerConnection
from consumer.assembly import Service
from consumer.closeout.inbox import Arrival
from consumer.contract.run_message import decode
from tests.support import run_messages as runs
from tests.support.http import TIMEOUT, Response, request
from tests.support.traffic import eventually, publish
from tests.support.waiting import until

# One of these is in every text that a runner may choose.
HOSTILE = {
    "script": "<script>window.hacked = 1; alert(1)</script>",
    "attribute": '" autofocus onfocus="alert(2)" x=\'',
    "image": "<img src=x onerror=alert(3)>",
    "svg": "</pre></svg><svg onload=alert(4)>",
    "address": "javascript:alert(5)//",
    "template": "{{ 7 * 7 }}{% raw %}",
    "turned": "safe\u202etxt.exe\u2066\u2069\u200f",
    "control": "\x1b[31mred\x07\x9d",
    "style": "</style><style>body { display: none }</style>",
    "comment": "--><!-- ]]> <![CDATA[",
    "entity": "&lt;b&gt; &#x3c;i> \u2028 \u2029",
}


async def until_shown(service: Service, path: str, *words: str, within: float = TIMEOUT) -> Response:
    """Request *path* until every one of *words* is in the page; each response must come *within* seconds."""

    async def shown() -> Response | None:
        response = await request(service.http.port, path, within=within)
        return response if all(word in response.body for word in words) else None

    return await until(shown, every=0.05, what=f"a page {path} with {words!r}")


def path_of(body: bytes) -> str:
    return f"/runs/{json.loads(body)['tenant_id']}/{runs.run_id_of(body)}"


async def close_out(broker: BrokerConnection, engine: AsyncEngine, *bodies: bytes, **properties: Any) -> None:
    """Publish *bodies* and wait until each one's last event is confirmed."""
    await publish(broker, *bodies, **properties)
    for body in bodies:
        phase = text("SELECT phase FROM governance.run_completions WHERE tenant_id = :tenant AND run_id = :run")
        identity = {"tenant": json.loads(body)["tenant_id"], "run": runs.run_id_of(body)}
        await eventually(engine, phase.bindparams(**identity), "EVENTS_PUBLISHED")


async def close_out_directly(engine: AsyncEngine, *bodies: bytes) -> None:
    """Close out the runs in *bodies* without a worker; their events stay in the outbox."""
    now = datetime.now(UTC)
    decoded = [decode(body, max_bytes=1_000_000) for body in bodies]
    arrivals = [Arrival(one.run, one.digest, now, adjustments=one.adjustments) for one in decoded]
    await create_transaction_coordinator(engine=engine).execute_many(arrivals)


def hostile_run(**changes: Any) -> bytes:
    """Return a run with hostile text in every field that a runner may choose."""
    steps = [
        {"index": n, "skill": words, "status": "failed", "duration_ms": 10, "error_code": "SKILL_ERROR",
         "kind": f"kind {words}", "model": f"model {words}", "error_message": words}
        for n, words in enumerate(HOSTILE.values())
    ]  # fmt: skip
    metadata = {f"{name} {words}": words for name, words in HOSTILE.items()}
    fields = {
        "agent_id": HOSTILE["script"],
        "model": HOSTILE["attribute"],
        "error_message": "\n".join(HOSTILE.values()),
        "synthetic_scenario_id": HOSTILE["image"],
        "is_synthetic": True,
        "session_id": HOSTILE["turned"],
        "parent_run_id": HOSTILE["comment"],
        "error_code": HOSTILE["svg"],  # adjusted
        "steps": steps,
        "metadata": metadata,
    }
    return runs.body(**{**fields, **changes})
