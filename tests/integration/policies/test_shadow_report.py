"""``closeout policies shadow``: shadow versions since they were applied, and the enforced one."""

import json

from sqlalchemy import text

from consumer import create_transaction_coordinator
from consumer.policy_analysis.shadow_results import caught_in_shadow
from domains.policies.apply import apply_policies
from domains.policies.files import PolicyDraft
from tests.support import run_messages as runs
from tests.support.command_line import closeout_blocking


def draft(name="cost", **changes):
    fields = {"tenant_id": None, "effect": "flag", "severity": "LOW", "condition": "true"}
    return PolicyDraft(name=name, **{**fields, **changes})


async def apply(engine, *drafts):
    async with engine.begin() as conn:
        await apply_policies(conn, drafts)


async def close_out(engine, *found):
    # A separate coordinator each time: it reads the policies again.
    await create_transaction_coordinator(engine=engine).execute_many(found)


def counted(caught):
    return {
        name: (count.runs, count.hits, count.newly, count.no_longer, count.errors)
        for name, count in caught.tally.tenants.items()
    }


async def test_without_shadow_policies_the_report_is_empty(engine):
    await apply(engine, draft(), draft("ended", mode="shadow"))
    await apply(engine, draft("ended", mode="shadow", enabled=False))
    await close_out(engine, runs.run())
    assert await caught_in_shadow(engine) == []


async def test_a_shadow_version_is_counted_next_to_the_enforced_one_since_it_was_applied(engine):
    await apply(engine, draft(condition="run.usage.cost_usd < 2.5"))
    await close_out(engine, runs.run(usage={"cost_usd": 9}))
    await apply(engine, draft(condition="run.usage.cost_usd > 1.5", mode="shadow"))
    cheap, middle, expensive = (runs.run(usage={"cost_usd": cost}) for cost in (1, 2, 3))
    unmeasured = runs.run(tenant_id="globex", usage={})
    await close_out(engine, cheap, middle, expensive, unmeasured)

    (caught,) = await caught_in_shadow(engine)

    assert (caught.version, caught.in_force, caught.tally.has_history) == (2, 1, True)
    assert counted(caught) == {"acme": (3, 2, 1, 1, 0), "globex": (1, 0, 0, 0, 1)}
    examples = {kind: [one.run_id for one in found] for kind, found in caught.tally.examples.items()}
    assert examples == {
        "newly": [expensive.run_id],
        "again": [middle.run_id],
        "no_longer": [cheap.run_id],
        "errors": [unmeasured.run_id],
    }
    (newly,) = caught.tally.examples["newly"]
    assert [(value.path, value.value) for value in newly.values] == [("run.usage.cost_usd", 3.0)]
    (error,) = caught.tally.examples["errors"]
    assert "overload" in (error.error or "")


async def test_a_shadow_suppressing_policy_is_counted_where_it_would_suppress(engine):
    await apply(engine, draft("quiet", effect="suppress_incident", condition="run.is_synthetic"))
    await apply(engine, draft("quiet", effect="suppress_incident", condition="true", mode="shadow"))
    await close_out(engine, runs.run(), runs.run(is_synthetic=True), runs.run(status="succeeded", error_code=None))
    (caught,) = await caught_in_shadow(engine)
    assert counted(caught) == {"acme": (3, 2, 1, 0, 0)}


async def test_the_report_can_be_limited_to_one_tenant(engine):
    await apply(engine, draft(mode="shadow"), draft("own", tenant_id="acme", mode="shadow"))
    await close_out(engine, runs.run(), runs.run(tenant_id="globex"))
    every, own = await caught_in_shadow(engine)
    assert counted(every) == {"acme": (1, 1, 1, 0, 0), "globex": (1, 1, 1, 0, 0)}
    assert counted(own) == {"acme": (1, 1, 1, 0, 0)}
    (every, own) = await caught_in_shadow(engine, tenant="globex")
    assert counted(every) == {"globex": (1, 1, 1, 0, 0)}
    assert counted(own) == {}


async def test_a_shadow_policy_that_does_not_compile_has_only_errors(engine):
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO governance.policies (policy_id, name, version, effect, severity, condition, enabled, "
                "shadow) VALUES (gen_random_uuid(), 'by hand', 1, 'flag', 'LOW', '((', false, 'running')"
            )
        )
    await close_out(engine, runs.run())
    (caught,) = await caught_in_shadow(engine)
    assert counted(caught) == {"acme": (1, 0, 0, 0, 1)}
    (error,) = caught.tally.examples["errors"]
    assert "does not compile" in (error.error or "")


async def test_a_policy_is_applied_in_shadow_reported_and_then_enforced(engine, database_url, tmp_path):
    file = tmp_path / "policies.yaml"
    shadow = "- {name: expensive, effect: flag, severity: LOW, condition: run.usage.cost_usd > 5.0, mode: shadow}\n"
    file.write_text(shadow)

    assert (
        invoked(database_url, "apply", str(file))
        == "expensive: created, version 1, in shadow; no version is enforced\n"
    )
    other = tmp_path / "off.yaml"
    other.write_text("- {name: later, effect: flag, severity: LOW, condition: 'true', enabled: false}\n")
    assert invoked(database_url, "apply", str(other)) == "later: created, version 1, off\n"
    assert "shadow" in invoked(database_url, "list")
    assert json.loads(invoked(database_url, "list", "--json"))[0]["shadow"] == "running"
    expensive = runs.run(usage={"cost_usd": 7.25})
    await close_out(engine, expensive, runs.run())
    output = invoked(database_url, "shadow")
    assert "Version 1, in shadow since" in output
    assert "expensive (flag LOW, all tenants): would flag 1 of 2 runs (50.0%)" in output
    assert f"acme/{expensive.run_id}" in output
    assert "run.usage.cost_usd = 7.25" in output
    (document,) = json.loads(invoked(database_url, "shadow", "--json"))
    assert (document["name"], document["version"], document["in_force"]) == ("expensive", 1, None)
    assert document["total"]["hits"] == 1

    file.write_text(shadow.replace(", mode: shadow", ""))
    assert invoked(database_url, "apply", str(file)) == "expensive: updated, version 2\n"
    await close_out(engine, runs.run(usage={"cost_usd": 7.25}))
    async with engine.connect() as conn:
        outcomes = await conn.execute(text("SELECT outcome FROM governance.policy_evaluations ORDER BY evaluated_at"))
        assert outcomes.scalars().all() == ["no_violation", "no_violation", "violation"]
    assert invoked(database_url, "shadow") == "0 policies in shadow\n"

    file.write_text(shadow.replace("5.0", "9.0"))
    assert invoked(database_url, "apply", str(file)) == (
        "expensive: updated, version 3, in shadow; version 2 stays enforced\n"
    )
    file.write_text(shadow.replace("5.0", "9.0").replace("mode: shadow", "mode: shadow, enabled: false"))
    assert invoked(database_url, "apply", str(file)) == (
        "expensive: disabled, version 3, not in shadow; version 2 stays enforced\n"
    )


def invoked(database_url: str, *words: str) -> str:
    done = closeout_blocking("policies", *words, DATABASE_URL=database_url)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
