"""A tenant cannot access another's run: the same ids in two tenants are two runs everywhere.

acme and globex each publish a run with the same run id and trace id, and with different text.
"""

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.contract.names import PARKED_QUEUE
from consumer.maintenance.reconcile import reconcile
from consumer.parked.copies import headers_of
from consumer.runs.lookup import read_run
from domains import tables
from domains.policies.apply import apply_policies
from domains.policies.files import read_policies
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to
from tests.support.command_line import closeout
from tests.support.http import request
from tests.support.traffic import emptied, eventually, listen, parked, publish, published_runs, received, worker
from tests.support.waiting import until

TENANTS = ("acme", "globex")
# Text that occurs only in this tenant's runs. No response about the other tenant's runs may contain it.
KNOWS = {"acme": "the acme password is swordfish", "globex": "globex bought the moon"}
POLICIES = """
- {name: of acme, effect: flag, severity: HIGH, condition: 'true', tenant_id: acme}
- {name: globex is quiet, effect: suppress_incident, severity: LOW, condition: 'true', tenant_id: globex}
- {name: of all, effect: flag, severity: LOW, condition: 'true'}
"""
WAITING = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
OF_TENANT = ("run_completions", "policy_evaluations", "traces")


@dataclass
class Twins:
    """Two messages that differ in tenant and text."""

    run_id: UUID
    trace_id: UUID

    def fields(self, tenant: str, **changes: Any) -> dict[str, Any]:
        fields = {"tenant_id": tenant, "run_id": str(self.run_id), "trace_id": str(self.trace_id)}
        return runs.message(**fields | {"error_message": KNOWS[tenant], "agent_id": f"agent-of-{tenant}"} | changes)

    def body(self, tenant: str, **changes: Any) -> bytes:
        return runs.body(self.fields(tenant, **changes))


@pytest.fixture
def twins() -> Twins:
    return Twins(uuid4(), uuid4())


async def rows(engine: AsyncEngine, table: str) -> list[dict[str, Any]]:
    async with engine.connect() as conn:
        found = await conn.execute(select(getattr(tables, table)).order_by(getattr(tables, table).c.tenant_id))
        return [dict(row) for row in found.mappings()]


async def test_the_same_run_id_in_two_tenants_is_two_runs_in_every_table_event_and_page(
    twins, database_url, amqp_url, engine, broker
):
    async with engine.begin() as conn:
        await apply_policies(conn, read_policies(POLICIES, source="test"))
    events = await listen(broker)
    async with worker(database_url, amqp_url) as service:
        await publish(broker, *[twins.body(tenant) for tenant in TENANTS])
        await eventually(engine, published_runs(), 2)
        await received(events, 6)
        pages = {
            tenant: await request(service.http.port, f"/runs/{tenant}/{twins.run_id}")
            for tenant in (*TENANTS, "nobody")
        }
    assert await emptied(broker, PARKED_QUEUE) == []

    for table in OF_TENANT:
        found = await rows(engine, table)
        assert [(row["tenant_id"], row["run_id"]) for row in found] == [(tenant, twins.run_id) for tenant in TENANTS]
    # A tenant's policy applies to its runs only; a policy without a tenant applies to both.
    assert [row["tenant_id"] for row in await rows(engine, "incidents")] == ["acme"]
    assert [row["tenant_id"] for row in await rows(engine, "prevention_records")] == ["globex"]
    violated = [[each["name"] for each in row["violations"]] for row in await rows(engine, "policy_evaluations")]
    assert violated == [["of acme", "of all"], ["of all"]]

    published = [json.loads(event.body) for event in events]
    assert len({event["id"] for event in published}) == 6
    for tenant in TENANTS:
        own = [event for event in published if event["data"]["tenant_id"] == tenant]
        assert {event["subject"] for event in own} == {f"{tenant}/{twins.run_id}"}
        assert len(own) == 3

    assert [pages[tenant].status for tenant in (*TENANTS, "nobody")] == [200, 200, 404]
    for tenant, other in (TENANTS, TENANTS[::-1]):
        assert f"agent-of-{tenant}" in pages[tenant].body
        for secret in (KNOWS[other], f"agent-of-{other}"):
            assert secret not in pages[tenant].body
            assert secret not in pages["nobody"].body
        kept = await read_run(engine, twins.run_id, tenant=tenant)
        assert kept is not None
        assert (kept.completion["tenant_id"], kept.completion["agent_id"]) == (tenant, f"agent-of-{tenant}")
        assert kept.trace is not None
        assert kept.trace["agent_id"] == f"agent-of-{tenant}"

    shown = await closeout("runs", "show", f"acme/{twins.run_id}", DATABASE_URL=database_url)
    assert shown.returncode == 0
    assert "agent-of-acme" in shown.stdout
    assert "globex" not in shown.stdout + shown.stderr


async def test_a_conflict_reveals_nothing_about_another_tenants_run(twins, database_url, amqp_url, engine, broker):
    async with worker(database_url, amqp_url):
        await publish(broker, twins.body("globex"))
        await eventually(engine, published_runs(), 1)
        # acme publishes globex's run id and trace id, then other content for its own run.
        await publish(broker, twins.body("acme"))
        await eventually(engine, published_runs(), 2)
        await publish(broker, twins.body("acme", status="succeeded", error_code=None, error_message=None))
        (message,) = await parked(broker, 1)
        kept = await read_run(engine, twins.run_id, tenant="globex")
        assert kept is not None
    headers = headers_of(message)
    assert headers["x-closeout-reason"] == "conflicting_duplicate"
    assert json.loads(message.body)["tenant_id"] == "acme"
    assert not any("globex" in str(value) or KNOWS["globex"] in str(value) for value in headers.values())
    assert kept.incident is not None
    assert kept.incident["error_message"] == KNOWS["globex"]
    assert kept.completion["status"] == "failed"


async def test_a_trace_is_completed_only_by_a_run_of_the_same_tenant(twins, database_url, amqp_url, engine, broker):
    async with engine.begin() as conn:  # both runners have inserted theirs, and acme's run is still running
        await conn.execute(
            text(
                "INSERT INTO governance.traces (tenant_id, trace_id, run_id, agent_id, status, started_at, steps) "
                "SELECT tenant, :trace, :run, 'agent-of-' || tenant, 'running', now(), '[]' "
                "FROM unnest(CAST(:tenants AS text[])) AS tenant"
            ),
            {"trace": twins.trace_id, "run": twins.run_id, "tenants": list(TENANTS)},
        )
    async with worker(database_url, amqp_url):
        await publish(broker, twins.body("globex"))
        await eventually(engine, published_runs(), 1)
        assert [(row["tenant_id"], row["status"]) for row in await rows(engine, "traces")] == [
            ("acme", "running"),
            ("globex", "failed"),
        ]
        await publish(broker, twins.body("acme", status="succeeded", error_code=None))
        await eventually(engine, published_runs(), 2)
    assert [(row["tenant_id"], row["status"]) for row in await rows(engine, "traces")] == [
        ("acme", "completed"),
        ("globex", "failed"),
    ]


async def test_a_failure_of_one_tenant_is_rolled_back_and_reported_for_that_tenant_alone(
    twins, database_url, amqp_url, engine, broker
):
    await break_writes_to(engine, "traces", KNOWS["acme"])
    async with engine.begin() as conn:
        await conn.execute(text("DROP TRIGGER refuse ON governance.traces"))
        await conn.execute(
            text(
                "CREATE TRIGGER refuse BEFORE INSERT ON governance.traces FOR EACH ROW "
                "WHEN (NEW.tenant_id = 'acme') EXECUTE FUNCTION governance.refuse()"
            )
        )
    one_at_once = {"DELIVERY_MAX_ATTEMPTS": "1", "MAX_CONCURRENT_TRANSACTIONS": "1"}
    async with worker(database_url, amqp_url, **one_at_once) as service:
        async with engine.begin() as conn:  # another run is blocked until both have arrived, so that they share a batch
            await conn.execute(text("LOCK TABLE governance.run_completions IN ACCESS EXCLUSIVE MODE"))
            await publish(broker, runs.body(tenant_id="zeta"))
            await eventually(engine, WAITING, 1)
            await publish(broker, *[twins.body(tenant) for tenant in TENANTS])
            registry = service.worker._settler._metrics.registry
            await until(lambda: registry.get_sample_value("closeout_inflight_deliveries") == 3)
        (message,) = await parked(broker, 1)
        await eventually(engine, published_runs(), 2)
    assert json.loads(message.body)["tenant_id"] == "acme"
    assert [row["tenant_id"] for row in await rows(engine, "run_completions")] == ["globex", "zeta"]
    kept = await read_run(engine, twins.run_id, tenant="globex")
    assert kept is not None
    assert len(kept.rollbacks) == 1, "they did not share a batch"
    assert KNOWS["acme"] not in str(kept)
    errors = [row["error"] for row in await rows(engine, "rollbacks") if row["tenant_id"] == "acme"]
    assert any(KNOWS["acme"] in error for error in errors)

    async with engine.begin() as conn:
        await conn.execute(text("DROP TRIGGER refuse ON governance.traces"))
    async with worker(database_url, amqp_url):
        await publish(broker, twins.body("acme"))
        await eventually(engine, published_runs(), 3)
    async with engine.begin() as conn:
        await conn.execute(text("DELETE FROM governance.policy_evaluations WHERE tenant_id = 'acme'"))
    broken = [finding for finding in await reconcile(engine, older_than_seconds=0) if finding.count]
    assert [(each.count, [example.tenant_id for example in each.examples]) for each in broken] == [(1, ["acme"])]


async def test_every_key_of_a_tenant_table_starts_with_the_tenant(engine):
    keys = text(
        """
        SELECT c.relname AS of_table, k.relname AS key,
               (SELECT attname FROM pg_attribute WHERE attrelid = c.oid AND attnum = i.indkey[0]) AS first
          FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_class k ON k.oid = i.indexrelid
         WHERE c.relnamespace = 'governance'::regnamespace AND i.indisunique
        """
    )
    foreign = text(
        """
        SELECT f.conname FROM pg_constraint f
         WHERE f.connamespace = 'governance'::regnamespace AND f.contype = 'f'
           AND NOT EXISTS (SELECT FROM pg_attribute a
                            WHERE a.attrelid = f.conrelid AND a.attnum = ANY (f.conkey) AND a.attname = 'tenant_id')
        """
    )
    homeless = text(
        """
        SELECT c.relname FROM pg_class c
         WHERE c.relnamespace = 'governance'::regnamespace AND c.relkind IN ('r', 'p')
           AND NOT EXISTS (SELECT FROM pg_attribute a
                            WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped)
        """
    )
    async with engine.connect() as conn:
        found = [tuple(row) for row in await conn.execute(keys)]
        assert len({of_table for of_table, _, _ in found}) == 9
        # A policy's id is not chosen by a tenant; its tenant is a separate column.
        assert {(t, key) for t, key, first in found if first != "tenant_id"} == {
            ("policies", "policies_pkey"),
            ("schema_version", "schema_version_pkc"),
        }
        assert list(await conn.execute(foreign)) == []
        assert list((await conn.execute(homeless)).scalars()) == ["schema_version"]
