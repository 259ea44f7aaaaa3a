"""``closeout runs``: a run report for every state, and the output on a terminal of 80 columns."""

import json
import re
from typing import Any

import pytest
from aiormq import spec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer import TransactionFailed, create_transaction_coordinator
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.closeout.inbox import Arrival
from consumer.closeout.legacy import LegacyCloseOut
from domains.policies.apply import apply_policies
from domains.policies.book import PolicyBook
from domains.policies.files import read_policies
from domains.run import CompletedRun
from tests.support import run_messages as runs
from tests.support.broken_writes import break_writes_to, repair_writes
from tests.support.command_line import closeout, on_a_terminal, plain
from tests.support.traffic import worker

POLICIES = """
- {name: expensive, effect: flag, severity: MEDIUM, condition: run.usage.cost_usd > 0.01}
- {name: divides, effect: flag, severity: LOW, condition: 1 / (run.usage.input_tokens - 1200) > 0}
- {name: night shift, effect: suppress_incident, severity: LOW, condition: 'run.error_code == "EXECUTION_TIMEOUT"',
   tenant_id: quiet}
- {name: candidate, effect: flag, severity: LOW, condition: "true", mode: shadow, tenant_id: loud}
"""


async def put_policies_into_force(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await apply_policies(conn, read_policies(POLICIES, source="test"))


async def shown(run: CompletedRun, url: str, *more: str, status: int = 0, **environ: str) -> str:
    done = await closeout("runs", "show", f"{run.tenant_id}/{run.run_id}", *more, DATABASE_URL=url, **environ)
    assert done.returncode == status, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


async def parked(broker: BrokerConnection, run: CompletedRun, reason: str, error: str) -> None:
    headers: dict[str, Any] = {"x-closeout-reason": reason, "x-closeout-error": error, "x-closeout-attempts": 1}
    await ConfirmedChannel(broker).send(
        exchange="", routing_key="closeout.parked", properties=spec.Basic.Properties(headers=headers),
        body=json.dumps({"tenant_id": run.tenant_id, "run_id": str(run.run_id)}).encode(),
    )  # fmt: skip


async def test_a_completed_run_is_shown_from_its_start_to_its_last_confirm(engine, database_url, broker, amqp_url):
    run = runs.run(tenant_id="loud")
    await put_policies_into_force(engine)
    await break_writes_to(engine, "traces")
    with pytest.raises(TransactionFailed):
        await create_transaction_coordinator(engine=engine).execute(run)
    await repair_writes(engine)
    await create_transaction_coordinator(engine=engine, amqp_url=amqp_url).execute(run)

    output = await shown(run, database_url)

    for words in (
        f"Run loud/{run.run_id}",
        "It failed after 30.5 s with EXECUTION_TIMEOUT; its incident is HIGH and OPEN.",
        "Phase EVENTS_PUBLISHED: everything is recorded, and its events are confirmed.",
        "2026-11-01 12:00:30.500 run failed with EXECUTION_TIMEOUT (runner's clock)",
        "message delivered to a worker",
        "attempt 1 rolled back at POLICY_EVALUATED: ",
        "injected",
        "(undone: ",
        "incident, evaluation, trace and events committed in one transaction",
        "all events confirmed by RabbitMQ",
        "incident HIGH, EXECUTION_FAILURE, OPEN: ",
        "error message: no answer within 30 s",
        "policies 2 checked: some failed to evaluate",
        "violated: expensive (version 1), MEDIUM",
        "in shadow, without effect: candidate (version 1), result flag",
        "evaluation failed: divides (version 1): ",
        f"trace failed, 2 steps, id {run.trace_id}",
        "0 search succeeded 120",
        "incident.created confirmed by 20",
        "cost usd 0.0125",
    ):
        assert words in output, words
    assert output.index("rolled back at") < output.index("committed in one")


async def test_a_suppressed_incident_names_the_policy_version_that_suppressed_it(engine, database_url):
    run = runs.run(tenant_id="quiet")
    await put_policies_into_force(engine)
    await create_transaction_coordinator(engine=engine).execute(run)
    why = "policy night shift (version 1, tenant quiet, {}): its condition was true: run.error_code =="

    output = await shown(run, database_url)
    assert f"no incident suppressed by {why.format('enforced')}" in output
    assert "a policy suppressed its incident. Phase COMMITTED: 3 of its 3 events are not confirmed" in output
    assert re.search(
        r"incident.suppressed unpublished since \S+ \S+, routing key incident.suppressed.high, id ", output
    )

    async with engine.begin() as conn:
        await conn.execute(text("UPDATE governance.policies SET enabled = false"))
    assert why.format("no longer enforced") in await shown(run, database_url)
    async with engine.begin() as conn:
        await conn.execute(text("DELETE FROM governance.policies"))
    assert "which no longer exists" in await shown(run, database_url)
    assert json.loads((await closeout("runs", "show", str(run.run_id), "--json", DATABASE_URL=database_url)).stdout)


async def test_an_unfinished_legacy_run_shows_where_it_stopped(engine, database_url):
    run = runs.run()
    await break_writes_to(engine, "policy_evaluations")
    with pytest.raises(TransactionFailed):
        await LegacyCloseOut(engine=engine, policies=PolicyBook()).execute(Arrival.of(run))

    output = await shown(run, database_url)

    assert "Phase INCIDENT_CREATED: the legacy close-out stopped after this write" in output
    assert "first write: incident or prevention record" in output
    assert "policies not evaluated yet" in output
    assert "trace none yet" in output
    assert "none yet events are published after the last write" in output


async def test_published_and_unpublished_events_are_shown_separately(engine, database_url):
    run = runs.run(trace_id=None)
    await create_transaction_coordinator(engine=engine).execute(run)
    async with engine.begin() as conn:
        await conn.execute(text("DELETE FROM governance.outbox_events WHERE sequence = 1"))

    output = await shown(run, database_url)

    assert "2 of its 3 events are not confirmed by RabbitMQ yet" in output
    assert "incident.created confirmed policy.evaluated unpublished since" in output
    assert "trace none: the run has no trace id" in output


async def test_an_unknown_run_with_a_parked_message_is_reported_as_parked(database_url, broker, amqp_url):
    run = runs.run()
    await parked(broker, run, "schema_violation", "status: found 'done'; expected succeeded")
    await parked(broker, runs.run(), "invalid_json", "another")

    output = await shown(run, database_url, status=1, AMQP_URL=amqp_url)
    plainly = await closeout("runs", "show", str(run.run_id), "--json", DATABASE_URL=database_url, AMQP_URL=amqp_url)

    assert "schema_violation: status: found 'done'; expected succeeded" in output
    assert "another" not in output
    assert (
        f"the runner must republish it with a valid body; then: closeout parked discard --run acme/{run.run_id}"
        in output
    )
    assert plainly.returncode == 1
    found = json.loads(plainly.stdout)
    assert found["run"] is None
    assert [message["reason"] for message in found["parked"]] == ["schema_violation"]


async def test_a_replay_is_suggested_for_a_valid_parked_message(database_url, broker, amqp_url):
    run = runs.run()
    await parked(broker, run, "attempts_exhausted", "a constraint")

    output = await shown(run, database_url, status=1, AMQP_URL=amqp_url)

    assert f"after fixing the cause: closeout parked replay --run acme/{run.run_id}" in output


async def test_an_unknown_run_reports_where_it_was_searched_for(database_url, broker, amqp_url, bare_amqp_url):
    run = runs.run()

    assert "no parked message has it" in await shown(run, database_url, status=1, AMQP_URL=amqp_url)
    assert "set AMQP_URL to search closeout.parked" in await shown(run, database_url, status=1)
    away = await shown(run, database_url, status=1, AMQP_URL="amqp://u:p@127.0.0.1:1/")
    assert "closeout.parked could not be searched: RabbitMQ is not available" in away


async def test_text_from_a_runner_cannot_control_the_terminal(engine, database_url):
    evil = "\x1b[2J\u202e[red]x[/red]"
    run = runs.run(error_message=f"{evil}\n" * 30, agent_id=evil, metadata={evil: evil})
    await create_transaction_coordinator(engine=engine).execute(run)

    done = await closeout("runs", "show", str(run.run_id), DATABASE_URL=database_url)

    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout)
    assert "\\u001b[2J\\u202e[red]x[/red]" in done.stdout
    assert "… cut: the first " in done.stdout


async def test_a_run_is_found_by_its_id_without_a_scan_and_an_ambiguous_one_needs_a_tenant(engine, database_url):
    async with engine.begin() as conn:
        await conn.execute(MANY_RUNS)
        await conn.execute(text("ANALYZE governance.run_completions"))
        run_id, scans = (await conn.execute(ONE_OF_THEM)).one()

    done = await closeout("runs", "show", str(run_id), DATABASE_URL=database_url)

    assert done.returncode == 2
    assert done.stderr == f"several tenants have a run {run_id}: t1, t2; select one with --tenant\n"
    async with engine.begin() as conn:
        assert (await conn.execute(ONE_OF_THEM)).one() == (run_id, scans)


# Of ten tenants; one run id exists in both t1 and t2.
MANY_RUNS = text(
    """
    INSERT INTO governance.run_completions (tenant_id, run_id, status, phase, mode, payload_digest, started_at,
           completed_at, is_synthetic, metadata, received_at, committed_at)
    SELECT 't' || number % 10, md5((number - (number = 12)::int)::text)::uuid, 'succeeded', 'COMMITTED', 'atomic', '',
           now(), now(), false, '{}', now(), now()
      FROM generate_series(1, 20000) AS number
    """
)
ONE_OF_THEM = text("SELECT md5('11')::uuid, seq_scan FROM pg_stat_user_tables WHERE relname = 'run_completions'")


LONG = "a-tenant-with-a-rather-long-name.eu-central-1"


async def populate(engine: AsyncEngine, broker: BrokerConnection) -> CompletedRun:
    """Store one of everything that the commands show."""
    await put_policies_into_force(engine)
    made = [runs.run(tenant_id=LONG, error_message="a long story " * 20) for _ in range(3)]
    await create_transaction_coordinator(engine=engine).execute_many(made)
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE governance.outbox_events SET created_at = now() - interval '3 h'"))
    await parked(broker, runs.run(tenant_id=LONG), "schema_violation", "steps[12].status: " + "found 'done' " * 30)
    return made[0]


COMMANDS = (
    ["runs", "list"], ["runs", "show", "RUN"], ["parked", "list"], ["outbox", "status"], ["reconcile"], ["doctor"],
    ["prune", "--older-than", "90d"], ["topology"], ["migrate"],
)  # fmt: skip


async def test_output_on_80_columns_is_not_truncated_and_matches_200_columns(engine, database_url, broker, amqp_url):
    run = await populate(engine, broker)
    name = f"{run.tenant_id}/{run.run_id}"
    for command in COMMANDS:
        arguments = [name if word == "RUN" else word for word in command]
        urls = {"DATABASE_URL": database_url, "AMQP_URL": amqp_url}
        _, narrow = await on_a_terminal(*arguments, columns=80, **urls)
        _, wide = await on_a_terminal(*arguments, columns=200, **urls)

        assert "Traceback" not in narrow
        # No cell was so narrow that an id was truncated or a word wrapped letter by letter.
        assert "…" not in narrow, narrow
        assert not re.search(r"(?:^ *\S{1,4} *\n){2}", narrow, re.MULTILINE), narrow
        missing = {word for word in set(_words(wide)) - set(_words(narrow)) if len(word) > 3 and word.isalpha()}
        # An id may be broken where its next digits are letters.
        assert {word for word in missing - set(_HEADINGS) if not re.fullmatch("[a-f]+", word)} == set(), narrow
        for identity in set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", wide)):
            assert identity in narrow, (identity, narrow)


async def test_output_on_40_columns_contains_each_step(engine, database_url):
    run = runs.run()
    await create_transaction_coordinator(engine=engine).execute(run)

    _, narrow = await on_a_terminal(
        "runs", "show", f"{run.tenant_id}/{run.run_id}", columns=40, DATABASE_URL=database_url
    )

    assert "…" not in narrow
    assert "0 search: succeeded, 120 ms, " in " ".join(narrow.split())


# Headings that narrow tables omit.
_HEADINGS = {
    "received",
    "code",
    "severity",
    "status",
    "mode",
    "phase",
    "policy",
    "error",
    "message",
    "reason",
    "parked",
}


def _words(written: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", plain(written))


@pytest.mark.parametrize("command", [["doctor"], ["reconcile"], ["outbox", "status"]])
async def test_colours_are_used_on_terminals_only_and_respect_no_color(engine, database_url, broker, amqp_url, command):
    await populate(engine, broker)
    urls: dict[str, Any] = {"DATABASE_URL": database_url, "AMQP_URL": amqp_url}

    _, coloured = await on_a_terminal(*command, colour=True, **urls)
    _, asked_not_to = await on_a_terminal(*command, **urls)
    piped = await closeout(*command, **urls)

    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m|\x1b\[1m")
    assert colour.search(coloured), coloured
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", asked_not_to)
    assert "\x1b" not in piped.stdout


async def test_a_run_of_a_live_worker_is_shown_completely(database_url, amqp_url, broker, engine):
    run = runs.run(error_code=None, status="succeeded")
    async with worker(database_url, amqp_url):
        await create_transaction_coordinator(engine=engine, amqp_url=amqp_url).execute(run)
        output = await shown(run, database_url)

    assert "incident NONE, EXECUTION_SUCCESS, CLOSED" in output
