"""Runs with text ids, their parents and children, and the adjustments of their messages."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from consumer import create_transaction_coordinator
from consumer.closeout.inbox import Arrival
from consumer.contract.run_message import decode
from consumer.runs.lookup import owners
from tests.support import run_messages as runs
from tests.support.command_line import closeout
from tests.support.traffic import emptied, listen, publish, received, worker
from tests.support.waiting import until


def arrival(**changes) -> Arrival:
    decoded = decode(runs.body(**changes), max_bytes=1_000_000)
    return Arrival(decoded.run, decoded.digest, datetime.now(UTC), adjustments=decoded.adjustments)


@pytest.fixture
async def stored(engine):
    parent = arrival(run_id="flow/17", session_id="c-1", error_code="openai.RateLimitError")
    child = arrival(run_id="flow/17:2", parent_run_id="flow/17", steps=[{"status": "succeeded", "kind": "llm"}])
    other = arrival(tenant_id="globex", run_id="flow/17")
    await create_transaction_coordinator(engine=engine).execute_many([parent, child, other])
    return parent, child


@pytest.mark.parametrize("name", [("acme/flow/17",), ("acme", "flow/17"), ("flow/17", "--tenant", "acme")])
async def test_a_run_is_shown_by_its_text_id(stored, database_url, name):
    shown = await closeout("runs", "show", *name, DATABASE_URL=database_url)
    assert shown.returncode == 0, shown.stderr
    assert "Run acme/flow/17" in shown.stdout
    assert "found openai.RateLimitError; stored OPENAI_RATELIMITERROR" in shown.stdout
    assert "started by this run" in shown.stdout
    assert "flow/17:2" in shown.stdout
    assert "c-1" in shown.stdout


async def test_a_slash_without_a_tenant_may_belong_to_the_id(stored, database_url):
    shown = await closeout("runs", "show", "flow/17:2", DATABASE_URL=database_url)
    assert "Run acme/flow/17:2" in shown.stdout, shown.stderr
    several = await closeout("runs", "show", "flow/17", DATABASE_URL=database_url)
    assert several.returncode == 2
    assert several.stderr == "several tenants have a run flow/17: acme, globex; select one with --tenant\n"
    unknown = await closeout("runs", "show", "flow/18", DATABASE_URL=database_url)
    assert unknown.returncode == 1
    assert "run flow/18 is not stored" in unknown.stderr


@pytest.mark.parametrize(
    ("filters", "listed"),
    [
        (["--session", "c-1"], ["acme/flow/17"]),
        (["--session", "c-1", "--tenant", "globex"], []),
        (["--adjusted"], ["acme/flow/17"]),
        (["--adjusted", "--status", "succeeded"], []),
    ],
)
async def test_runs_are_listed_by_session_and_by_adjustments(stored, database_url, filters, listed):
    done = await closeout("runs", "list", "--json", *filters, DATABASE_URL=database_url)
    assert done.returncode == 0, done.stderr
    assert sorted(f"{run['tenant_id']}/{run['run_ref']}" for run in json.loads(done.stdout)) == listed


async def test_a_step_is_shown_with_its_kind_model_tokens_and_start(engine, database_url):
    step = {
        "index": 0, "status": "failed", "skill": "plan", "kind": "llm", "model": "gpt-4o", "input_tokens": 1_200,
        "output_tokens": 34, "started_at": "2026-11-01T13:00:02.25+01:00", "error_code": "REFUSED",
        "error_message": "no seats",
    }  # fmt: skip
    await create_transaction_coordinator(engine=engine).execute_many([arrival(run_id="detailed", steps=[step])])
    for columns in ("79", "200"):
        shown = await closeout("runs", "show", "acme/detailed", DATABASE_URL=database_url, COLUMNS=columns)
        assert shown.returncode == 0, shown.stderr
        output = " ".join(shown.stdout.split())
        assert "llm, gpt-4o, 1,200 input + 34 output tokens, at 12:00:02.250" in output
        assert "REFUSED: no seats" in output


async def test_the_uuid_of_a_text_id_names_the_same_run(stored, database_url):
    parent, _ = stored
    shown = await closeout("runs", "show", str(parent.run.run_id), "--json", DATABASE_URL=database_url)
    found = json.loads(shown.stdout)["completion"]
    assert (found["run_ref"], found["session_id"], found["step_count"]) == ("flow/17", "c-1", 2)
    assert found["adjustments"] == [
        {"field": "error_code", "found": "openai.RateLimitError", "stored": "OPENAI_RATELIMITERROR"}
    ]


async def test_a_text_id_of_several_tenants_lists_them(stored, engine, database_url):
    async with engine.connect() as conn:
        assert {key.tenant_id for key in await owners(conn, "flow-17")} == set()
        assert {key.tenant_id for key in await owners(conn, "flow/17")} == {"acme", "globex"}
    child = await closeout("runs", "show", "acme/flow/17:2", DATABASE_URL=database_url)
    assert "parent run id" in child.stdout
    assert "llm" in child.stdout


async def test_a_policy_reads_the_new_fields(stored, database_url, tmp_path):
    file = tmp_path / "policies.yaml"
    condition = "run.run_ref == 'flow/17:2' && run.parent_run_id == 'flow/17' && run.steps[0].kind == 'llm'"
    file.write_text(f'policies: [{{name: child, effect: flag, severity: LOW, condition: "{condition}"}}]')
    tried = await closeout("policies", "test", str(file), "--run", "acme/flow/17:2", DATABASE_URL=database_url)
    assert tried.returncode == 0, tried.stderr
    assert "true" in tried.stdout


async def test_events_contain_the_text_id(database_url, amqp_url, broker):
    events = await listen(broker)
    async with worker(database_url, amqp_url):
        await publish(broker, runs.body(run_id="flow/18"))
        await received(events, 3)
    for event in events:
        body = json.loads(event.body)
        assert (body["subject"], body["data"]["run_ref"]) == ("acme/flow/18", "flow/18")


SAME_MEANING: list[dict[str, Any]] = [
    {"status": "FAILED"},
    {"usage": {"output_tokens": 340.0, "input_tokens": "1200", "cost_usd": "0.01250"}},
    {"started_at": "2026-11-01T13:00:00+01:00"},
    {"session_id": None},
    {"unknown": 1},
    {"metadata": {"retries": 2, "region": "eu"}},
]
OTHER_MEANING: list[tuple[dict[str, Any], str]] = [
    ({"status": "halted"}, 'status: stored "failed", found "halted"'),
    ({"usage": {"cost_usd": 0.02}}, "usage.cost_usd: stored 0.0125, found 0.02"),
    ({"metadata": {"region": "us", "retries": 2}}, 'metadata.region: stored "eu", found "us"'),
    ({"error_message": "another"}, 'error_message: stored "no answer within 30 s", found "another"'),
    ({"steps": []}, "steps: stored 2, found 0"),
    ({"session_id": "c"}, 'session_id: stored null, found "c"'),
]


async def test_the_same_meaning_is_a_duplicate_and_a_conflict_names_the_difference(database_url, amqp_url, broker):
    fields = runs.message()
    async with worker(database_url, amqp_url) as service:
        settled = service.worker._settler._metrics.registry.get_sample_value
        await publish(broker, runs.body(fields))
        # Two transactions run at once: without this wait, a later message could be the one that is stored.
        await until(lambda: settled("closeout_deliveries_total", {"result": "committed"}))
        for changes in SAME_MEANING:
            await publish(broker, json.dumps({**fields, **changes}, indent=1).encode())
        for changes, _ in OTHER_MEANING:
            await publish(broker, runs.body({**fields, **changes}))
        await until(
            lambda: (
                (settled("closeout_deliveries_total", {"result": "parked"}) or 0) >= len(OTHER_MEANING)
                and (settled("closeout_deliveries_total", {"result": "duplicate"}) or 0) >= len(SAME_MEANING)
            )
        )
    errors = [(m.header.properties.headers or {})["x-closeout-error"] for m in await emptied(broker, "closeout.parked")]
    differences = {str(error).partition("the stored run is unchanged: ")[2] for error in errors}
    assert differences == {difference for _, difference in OTHER_MEANING}


async def test_publish_check_reports_how_a_worker_would_treat_each_line(tmp_path):
    file = tmp_path / "runs.jsonl"
    lines = [runs.body(), runs.body(error_code="x.y"), runs.body(status="odd"), b"{"]
    file.write_bytes(b"\n".join(lines))
    checked = await closeout("publish", "--check", str(file))
    assert checked.returncode == 1
    assert checked.stdout.splitlines() == [
        "line 1: accepted",
        "line 2: accepted, with adjustments",
        "  error_code: found x.y; stored X_Y",
        'line 3: refused: schema_violation: status: found "odd"; expected one of succeeded, failed, halted, aborted',
        "line 4: refused: invalid_json: not JSON: Input data was truncated; expected one JSON object in UTF-8",
        "2 accepted (1 with adjustments), 2 refused",
    ]
    as_json = json.loads((await closeout("publish", "--check", str(file), "--json")).stdout)
    assert [line["result"] for line in as_json["lines"]] == ["accepted", "adjusted", "refused", "refused"]
    file.write_bytes(lines[0])
    assert (await closeout("publish", "--check", str(file))).returncode == 0


async def test_policies_apply_warns_of_a_tenant_without_runs(stored, database_url, tmp_path):
    file = tmp_path / "policies.yaml"
    one = "{{name: p-{0}, tenant_id: {0}, effect: flag, severity: LOW, condition: 'true'}}"
    file.write_text(f"policies: [{one.format('acme')}, {one.format('acmee')}]")
    applied = await closeout("policies", "apply", str(file), DATABASE_URL=database_url)
    assert applied.returncode == 0, applied.stderr
    assert applied.stderr == "warning: tenant acmee has no runs; if it is not new, check its spelling\n"


HOSTILE = "a\u202eb\x9b31mc\u2066"


async def test_json_output_escapes_what_a_terminal_would_act_on(engine, database_url):
    await create_transaction_coordinator(engine=engine).execute_many([arrival(run_id="-x", agent_id=HOSTILE)])
    shown = await closeout("runs", "show", "acme", "-x", "--json", DATABASE_URL=database_url)
    assert shown.returncode == 0, shown.stderr
    assert not set(HOSTILE) - set("abcm31") & set(shown.stdout)
    assert json.loads(shown.stdout)["completion"]["agent_id"] == HOSTILE


@pytest.mark.parametrize("name", [("-x",), ("acme/-x",), ("acme", "-x"), ("-x", "--tenant", "acme")])
async def test_an_id_may_begin_with_a_hyphen(engine, database_url, name):
    await create_transaction_coordinator(engine=engine).execute_many([arrival(run_id="-x")])
    shown = await closeout("runs", "show", *name, DATABASE_URL=database_url)
    assert shown.returncode == 0, shown.stderr
    assert "Run acme/-x" in shown.stdout


async def test_a_long_error_message_is_cut_with_a_note(engine, database_url):
    await create_transaction_coordinator(engine=engine).execute_many(
        [arrival(run_id="long", error_message="W" * 900_000)]
    )
    shown = await closeout("runs", "show", "acme/long", DATABASE_URL=database_url)
    assert len(shown.stdout) < 10_000
    assert "… cut: the first 2,000 of 900,015 characters (--full prints all)" in shown.stdout
    full = await closeout("runs", "show", "acme/long", "--full", DATABASE_URL=database_url)
    assert full.stdout.count("W") == 900_000


async def test_policies_list_names_the_policy_whose_condition_fails(engine, database_url, tmp_path):
    file = tmp_path / "policies.yaml"
    failing = "run.metadata.absent > 1"
    file.write_text(f'policies: [{{name: broken, effect: flag, severity: LOW, condition: "{failing}"}}, '
                    "{name: fine, effect: flag, severity: LOW, condition: 'false'}]")  # fmt: skip
    await closeout("policies", "apply", str(file), DATABASE_URL=database_url)
    await create_transaction_coordinator(engine=engine).execute_many([arrival() for _ in range(3)])
    applied = await closeout("policies", "apply", str(file), DATABASE_URL=database_url)
    assert applied.stderr.startswith("warning: the condition of broken fails on 3 of the last 3 runs: ")
    assert "fine" not in applied.stderr
    listed = await closeout("policies", "list", DATABASE_URL=database_url)
    (broken,) = [line for line in listed.stdout.splitlines() if "broken" in line]
    (fine,) = [line for line in listed.stdout.splitlines() if "fine" in line]
    assert "FAILED on 3 of 3 runs of the last day" in broken
    assert "FAILED" not in fine
