"""Policies in shadow: evaluated on every run and counted, without effect, alongside the enforced version."""

import asyncio
from urllib.request import urlopen

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from consumer import create_transaction_coordinator
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from domains.policies.apply import apply_policies, list_policies
from domains.policies.book import PolicyBook
from domains.policies.files import PolicyDraft
from tests.support import run_messages as runs
from tests.support.broken_writes import count, only_row
from tests.support.traffic import eventually, publish, published_runs, worker


def draft(**changes):
    fields = {"name": "p", "tenant_id": None, "effect": "flag", "severity": "LOW", "condition": "true"}
    return PolicyDraft(**{**fields, **changes})


def shadow(**changes):
    return draft(mode="shadow", **changes)


async def apply(engine, *drafts):
    async with engine.begin() as conn:
        return await apply_policies(conn, drafts)


async def states(engine):
    async with engine.connect() as conn:
        return [(p["version"], p["enabled"], p["shadow"]) for p in await list_policies(conn, all_versions=True)]


ALL_EFFECTS = (
    shadow(name="flags"),
    shadow(name="suppresses", effect="suppress_incident"),
    shadow(name="fails", condition="run.nothing == 1"),
    shadow(name="false", condition="false"),
)
RESULTS = [("fails", "error"), ("flags", "flag"), ("suppresses", "suppress_incident")]


async def test_a_shadow_policy_is_recorded_and_has_no_effect(engine):
    await apply(engine, *ALL_EFFECTS, draft(name="in force", condition="false"))

    await create_transaction_coordinator(engine=engine).execute(runs.run())

    stored = await only_row(engine, "policy_evaluations")
    assert (stored["outcome"], stored["policies_checked"]) == ("no_violation", 1)
    assert (stored["violations"], stored["errors"]) == ([], [])
    assert [(found["name"], found["result"]) for found in stored["shadow"]] == RESULTS
    assert [found.get("error") for found in stored["shadow"]] == [
        'NOT_FOUND: Key not found in map : "nothing"',
        None,
        None,
    ]
    assert await count(engine, "incidents") == 1
    assert await count(engine, "prevention_records") == 0
    async with engine.connect() as conn:
        bodies = (await conn.execute(text("SELECT body FROM governance.outbox_events"))).scalars().all()
    assert len(bodies) == 3
    assert not any("flags" in body or "shadow" in body for body in bodies)


async def test_the_legacy_path_records_shadow_results(engine):
    await apply(engine, *ALL_EFFECTS)

    legacy = LegacyCloseOut(engine=engine, policies=PolicyBook())
    result = await legacy.execute(Arrival.of(runs.run()))

    assert [shadowed for done in result.results for shadowed in done.shadow] == [kind for _, kind in RESULTS]
    stored = await only_row(engine, "policy_evaluations")
    assert [(found["name"], found["result"]) for found in stored["shadow"]] == RESULTS
    assert (stored["outcome"], stored["policies_checked"]) == ("no_violation", 0)
    assert await count(engine, "incidents") == 1


async def test_a_shadow_policy_without_a_result_stores_nothing(engine):
    await apply(engine, shadow(condition="false"), shadow(name="s", effect="suppress_incident"))
    await create_transaction_coordinator(engine=engine).execute(runs.run(status="succeeded", error_code=None))
    assert (await only_row(engine, "policy_evaluations"))["shadow"] is None


async def test_a_shadow_version_leaves_the_enforced_version_until_it_is_enforced(engine):
    await apply(engine, draft())
    (change,) = await apply(engine, shadow(condition="1 == 1"))
    assert (change.change, change.version, change.in_force) == ("updated", 2, 1)
    assert await states(engine) == [(2, False, "running"), (1, True, None)]
    async with engine.connect() as conn:
        assert [p["version"] for p in await list_policies(conn)] == [2, 1]

    (change,) = await apply(engine, draft(condition="1 == 1"))
    assert (change.change, change.version, change.in_force) == ("updated", 3, 3)
    assert await states(engine) == [(3, True, None), (2, False, "ended"), (1, False, None)]
    async with engine.connect() as conn:
        assert [p["version"] for p in await list_policies(conn)] == [3]


async def test_changes_of_a_shadow_version_leave_the_enforced_version_unchanged(engine):
    await apply(engine, draft())
    second = {"condition": "2 == 2"}
    assert [c.change for c in await apply(engine, shadow(**second))] == ["updated"]
    assert [c.change for c in await apply(engine, shadow(**second))] == ["unchanged"]
    assert [c.change for c in await apply(engine, shadow(condition="3 == 3"))] == ["updated"]
    assert await states(engine) == [(3, False, "running"), (2, False, "ended"), (1, True, None)]
    assert [c.change for c in await apply(engine, shadow(condition="3 == 3", enabled=False))] == ["disabled"]
    assert await states(engine) == [(3, False, "ended"), (2, False, "ended"), (1, True, None)]
    assert [c.change for c in await apply(engine, shadow(condition="3 == 3"))] == ["enabled"]
    assert await states(engine) == [(3, False, "running"), (2, False, "ended"), (1, True, None)]


async def test_a_new_shadow_policy_has_no_enforced_version(engine):
    (change,) = await apply(engine, shadow())
    assert (change.change, change.version, change.in_force) == ("created", 1, None)


async def test_the_database_refuses_an_enabled_shadow_policy(engine):
    await apply(engine, shadow())
    with pytest.raises(IntegrityError, match="policies_shadow_check"):
        async with engine.begin() as conn:
            await conn.execute(text("UPDATE governance.policies SET enabled = true"))


async def test_enforced_and_shadow_version_of_one_run_are_recorded_separately(engine):
    await apply(engine, draft())
    await apply(engine, shadow(condition="1 == 1"))
    await create_transaction_coordinator(engine=engine).execute(runs.run())
    stored = await only_row(engine, "policy_evaluations")
    assert [found["version"] for found in stored["violations"]] == [1]
    assert [found["version"] for found in stored["shadow"]] == [2]


def metrics_at(port: int) -> dict[str, str]:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


async def test_a_worker_counts_the_results_of_shadow_policies_once_per_run(engine, database_url, amqp_url, broker):
    await apply(engine, *ALL_EFFECTS)
    bodies = [runs.body(), runs.body(status="succeeded", error_code=None)]
    async with worker(database_url, amqp_url) as service:
        await publish(broker, *bodies, *bodies)
        await eventually(engine, published_runs(), 2)
        metrics: dict[str, str] = {}
        async with asyncio.timeout(15):
            while metrics.get('closeout_deliveries_total{result="duplicate"}') != "2.0":
                metrics = await asyncio.to_thread(metrics_at, service.http.port)
    assert {name: value for name, value in metrics.items() if "closeout_policy_shadow_total" in name} == {
        'closeout_policy_shadow_total{result="flag"}': "2.0",
        'closeout_policy_shadow_total{result="suppress_incident"}': "1.0",
        'closeout_policy_shadow_total{result="error"}': "2.0",
    }
