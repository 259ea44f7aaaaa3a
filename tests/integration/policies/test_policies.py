"""Policies as rows: applied with versions, taken up without a restart, never fatal."""

import asyncio
from uuid import uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import create_transaction_coordinator
from consumer.closeout.transaction import RunCompletionTransaction
from domains import tables
from domains.policies.apply import apply_policies, list_policies
from domains.policies.book import PolicyBook
from domains.policies.cel.conditions import Condition
from domains.policies.files import PolicyDraft
from domains.policies.rules import Policy, PolicySet, evaluate
from domains.policies.writes import record, record_once
from tests.support import run_messages as runs
from tests.support.broken_writes import only_row


def draft(**changes):
    fields = {"name": "p", "tenant_id": None, "effect": "flag", "severity": "LOW", "condition": "true"}
    return PolicyDraft(**{**fields, **changes})


async def apply(engine: AsyncEngine, *drafts: PolicyDraft) -> list[tuple[str, int]]:
    async with engine.begin() as conn:
        return [(change.change, change.version) for change in await apply_policies(conn, drafts)]


async def test_a_changed_policy_becomes_a_new_version_and_the_old_one_is_kept_disabled(engine):
    assert await apply(engine, draft()) == [("created", 1)]
    assert await apply(engine, draft()) == [("unchanged", 1)]
    assert await apply(engine, draft(condition="false")) == [("updated", 2)]
    assert await apply(engine, draft(condition="false", enabled=False)) == [("disabled", 2)]
    assert await apply(engine, draft(condition="false")) == [("enabled", 2)]
    async with engine.connect() as conn:
        every = await list_policies(conn, all_versions=True)
        newest = await list_policies(conn)
    assert [(p["version"], p["enabled"], p["condition"]) for p in every] == [(2, True, "false"), (1, False, "true")]
    assert [p["version"] for p in newest] == [2]


async def test_a_tenants_policy_and_one_for_all_tenants_may_share_a_name(engine):
    assert await apply(engine, draft(), draft(tenant_id="acme")) == [("created", 1), ("created", 1)]
    async with engine.connect() as conn:
        assert len(await list_policies(conn, tenant_id="acme")) == 2
        assert [p["tenant_id"] for p in await list_policies(conn, tenant_id="other")] == [None]


async def test_concurrent_appliers_create_consecutive_versions(engine):
    first, second = await asyncio.gather(
        apply(engine, draft(condition="1 == 1")), apply(engine, draft(condition="2 == 2"))
    )
    assert sorted([*first, *second]) == [("created", 1), ("updated", 2)]


async def test_a_changed_policy_takes_effect_without_a_restart_and_is_compiled_once(engine, monkeypatch):
    compiled: list[str] = []
    original = Condition.__init__

    def counting(self: Condition, source: str) -> None:
        compiled.append(source)
        original(self, source)

    monkeypatch.setattr(Condition, "__init__", counting)
    coordinator = RunCompletionTransaction(engine=engine, policies=PolicyBook(max_age_seconds=0))
    await coordinator.execute(runs.run())
    await apply(engine, draft(condition="run.status == 'failed'"))
    for _ in range(3):
        await coordinator.execute(runs.run())
    async with engine.connect() as conn:
        outcomes = (
            (
                await conn.execute(
                    select(tables.policy_evaluations.c.outcome).order_by(tables.policy_evaluations.c.evaluated_at)
                )
            )
            .scalars()
            .all()
        )
    assert outcomes == ["no_violation", "violation", "violation", "violation"]
    assert compiled == ["run.status == 'failed'"]


async def test_concurrent_transactions_see_the_policies_from_the_first_run(engine):
    await apply(engine, draft())
    coordinator = create_transaction_coordinator(engine=engine)
    await asyncio.gather(*(coordinator.execute(runs.run()) for _ in range(6)))
    async with engine.connect() as conn:
        checked = (await conn.execute(select(tables.policy_evaluations.c.policies_checked))).scalars().all()
    assert checked == [1] * 6


async def test_a_condition_that_fails_to_evaluate_is_recorded_and_the_run_is_closed_out(engine):
    await apply(engine, draft(name="broken", condition="run.nothing == 1"), draft(name="fine"))
    assert (await create_transaction_coordinator(engine=engine).execute(runs.run())).state == "committed"
    stored = await only_row(engine, "policy_evaluations")
    assert stored["outcome"] == "evaluation_error"
    assert [error["name"] for error in stored["errors"]] == ["broken"]
    assert [violation["name"] for violation in stored["violations"]] == ["fine"]


@pytest.mark.parametrize("condition", ["((", "run.error_message.matches('(a|b)*c')"])
async def test_an_invalid_condition_inserted_by_hand_cannot_stop_the_worker(engine, condition):
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.policies (policy_id, name, version, effect, severity, condition, enabled) "
                "VALUES (gen_random_uuid(), 'by hand', 1, 'flag', 'LOW', :condition, true)"
            ),
            {"condition": condition},
        )
    assert (await create_transaction_coordinator(engine=engine).execute(runs.run())).state == "committed"


async def test_recording_an_evaluation_again_keeps_and_returns_the_first(engine):
    run = runs.run()
    broken, fine = (
        Policy(policy_id=uuid4(), tenant_id=None, name=name, version=3, effect="flag", severity="HIGH", condition=text)
        for name, text in (("broken", "run.nothing == 1"), ("fine", "true"))
    )
    first = evaluate(run, PolicySet((policy, Condition(policy.condition)) for policy in (broken, fine)))
    async with engine.begin() as conn:
        assert await record_once(conn, first) == first
    async with engine.begin() as conn:
        assert await record_once(conn, evaluate(run, PolicySet(()))) == first
    assert (await only_row(engine, "policy_evaluations"))["policy_evaluation_id"] == first.policy_evaluation_id


async def test_evaluations_of_many_tenants_are_recorded_in_one_statement(engine):
    run = runs.run()
    found = [evaluate(runs.run(tenant_id=f"t{n}", run_id=str(run.run_id)), PolicySet(())) for n in range(100)]
    async with engine.begin() as conn:
        results = await record(conn, found)
    async with engine.connect() as conn:
        stored = (await conn.execute(select(tables.policy_evaluations))).mappings().all()
    assert {row["tenant_id"]: row["policy_evaluation_id"] for row in stored} == {
        one.tenant_id: one.policy_evaluation_id for one in found
    }
    assert {results[one.key].record_id for one in found} == {one.policy_evaluation_id for one in found}


async def test_a_stored_condition_that_would_exhaust_memory_is_an_error_of_its_policy(engine):
    greedy = "size([run.error_message]" + ".map(x, x + x)" * 25 + ") > 0"
    await apply(engine, draft(name="greedy", condition=greedy), draft(name="fine"))
    assert (await create_transaction_coordinator(engine=engine).execute(runs.run())).state == "committed"
    stored = await only_row(engine, "policy_evaluations")
    assert [("too expensive" in error["error"], error["name"]) for error in stored["errors"]] == [(True, "greedy")]
    assert [violation["name"] for violation in stored["violations"]] == ["fine"]
