"""``closeout policies backtest``: a file's policies over stored runs, read-only, and the enforced ones."""

import asyncio
import json
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from multiprocessing import active_children
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from consumer import create_transaction_coordinator
from consumer.closeout.inbox import Arrival
from consumer.errors import UnavailableError
from consumer.policy_analysis import backtest as module
from consumer.policy_analysis.backtest import backtest
from consumer.policy_analysis.evaluation import Evaluation
from consumer.policy_analysis.processes import Processes
from consumer.policy_analysis.tally import share_between
from consumer.postgres.engine import create_engine
from consumer.runs import stored
from consumer.runs.pages import estimate, pages, sample, spans
from consumer.runs.stored import read_runs, reading
from domains.policies.apply import apply_policies
from domains.policies.cel.visible import Visible, visible_fields
from domains.policies.explain import ask
from domains.policies.files import PolicyDraft
from domains.run import RunKey
from domains.tables import metadata
from tests.support import run_messages as runs
from tests.support.command_line import closeout_blocking
from tests.support.waiting import PATIENCE

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
KEYS = stored.Columns(frozenset())
MONTH: dict[str, Any] = {"since": NOW - timedelta(days=30), "until": NOW}


def draft(name="p", **changes):
    fields = {"tenant_id": None, "effect": "flag", "severity": "LOW", "condition": "true"}
    return PolicyDraft(name=name, **{**fields, **changes})


async def apply(engine, *drafts):
    async with engine.begin() as conn:
        await apply_policies(conn, drafts)


async def close_out(engine, *found, received_at=NOW - timedelta(hours=1)):
    arrivals = [Arrival.of(run)._replace(received_at=received_at) for run in found]
    await create_transaction_coordinator(engine=engine).execute_many(arrivals)


def counted(tally):
    return {
        name: (count.runs, count.hits, count.newly, count.no_longer, count.errors, count.unknown)
        for name, count in tally.tenants.items()
    }


async def test_the_backtest_counts_the_results_of_each_policy_by_tenant(engine):
    acme = [runs.run(usage={"cost_usd": cost}) for cost in (1, 2, 3)]
    globex = [runs.run(tenant_id="globex", usage={}), runs.run(tenant_id="globex", usage={"cost_usd": 9})]
    await close_out(engine, *acme, *globex)

    result = await backtest(
        engine,
        [
            draft("expensive", condition="run.usage.cost_usd > 1.5"),
            draft("own", tenant_id="acme"),
            draft("off", enabled=False),
        ],
        **MONTH,
    )

    assert result.runs == 5
    expensive, own = result.tallies
    assert counted(expensive) == {"acme": (3, 2, 2, 0, 0, 0), "globex": (2, 1, 1, 0, 1, 0)}
    assert counted(own) == {"acme": (3, 3, 3, 0, 0, 0)}
    assert not expensive.has_history
    assert {example.run_id for example in expensive.examples["newly"]} == {
        acme[1].run_id,
        acme[2].run_id,
        globex[1].run_id,
    }
    (error,) = expensive.examples["errors"]
    assert error.run_id == globex[0].run_id
    assert "overload" in (error.error or "")
    assert [(value.path, value.value) for value in error.values] == [("run.usage.cost_usd", None)]


async def test_the_backtest_suppresses_only_runs_that_did_not_succeed(engine):
    await close_out(engine, *(runs.run(status=status) for status in ("succeeded", "failed", "halted", "aborted")))
    (tally,) = (await backtest(engine, [draft(effect="suppress_incident")], **MONTH)).tallies
    assert counted(tally) == {"acme": (4, 3, 3, 0, 0, 0)}


async def test_the_backtest_compares_with_the_enforced_policy_of_the_same_name_and_tenant(engine):
    await apply(
        engine,
        draft("cost", condition="run.usage.cost_usd < 2.5"),
        draft("cost", tenant_id="globex", condition="false"),
        draft("quiet", effect="suppress_incident", condition="run.is_synthetic"),
        draft("watched", mode="shadow"),
    )
    cheap, middle, expensive = (runs.run(usage={"cost_usd": cost}) for cost in (1, 2, 3))
    silent = runs.run(is_synthetic=True, usage={"cost_usd": 9}, metadata={"loud": True})
    await close_out(engine, cheap, middle, expensive, silent)

    result = await backtest(
        engine,
        [
            draft("cost", condition="run.usage.cost_usd > 1.5"),
            draft("quiet", effect="suppress_incident", condition="run.is_synthetic && !has(run.metadata.loud)"),
            draft("watched"),
        ],
        **MONTH,
    )

    cost, quiet, watched = result.tallies
    assert (result.in_force.flagged, result.in_force.suppressed, result.in_force.errors) == (2, 1, 0)
    assert counted(cost) == {"acme": (4, 3, 2, 1, 0, 0)}
    assert [example.run_id for example in cost.examples["no_longer"]] == [cheap.run_id]
    assert [example.run_id for example in cost.examples["again"]] == [middle.run_id]
    assert counted(quiet) == {"acme": (4, 0, 0, 1, 0, 0)}
    assert (cost.has_history, quiet.has_history) == (True, True)
    # A policy that was only ever in shadow has no history.
    assert (watched.has_history, watched.total.newly) == (False, 4)


async def test_results_that_depend_on_fields_not_stored_are_unknown(engine):
    await apply(engine, draft("quiet", effect="suppress_incident", condition="run.is_synthetic"))
    untraced = runs.run(trace_id=None)
    suppressed = runs.run(is_synthetic=True)
    await close_out(engine, untraced, suppressed, runs.run())

    result = await backtest(
        engine,
        [
            draft("steps", condition="run.steps.exists(s, s.status == 'failed')"),
            draft("words", condition="run.error_message.contains('answer')"),
            draft("either", condition="run.status == 'failed' || size(run.steps) > 9"),
        ],
        **MONTH,
    )

    steps, words, either = result.tallies
    assert counted(steps) == {"acme": (3, 2, 2, 0, 0, 1)}
    assert counted(words) == {"acme": (3, 2, 2, 0, 0, 1)}
    assert counted(either) == {"acme": (3, 3, 3, 0, 0, 0)}


TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40)
COST = st.none() | st.decimals(0, 10**11, allow_nan=False, places=6)
FRACTIONS = st.floats(-1e15, 1e15).map(lambda number: number + 0.5)
FIELDS = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["succeeded", "failed", "halted", "aborted"]),
        "agent_id": st.none() | TEXT,
        "model": st.none() | TEXT,
        "error_code": st.none() | st.just("AGENT_CRASH"),
        "error_message": st.none() | TEXT | st.just("é" * 5_000),
        "usage": st.fixed_dictionaries({"cost_usd": COST, "input_tokens": st.none() | st.integers(0, 2**63 - 1)}),
        "steps": st.lists(
            st.fixed_dictionaries(
                {"skill": st.none() | TEXT, "status": st.just("skipped"), "cost_usd": COST, "duration_ms": st.none()}
            ),
            max_size=3,
        ).map(lambda steps: [{**step, "index": number} for number, step in enumerate(steps)]),
        "is_synthetic": st.booleans(),
        "synthetic_scenario_id": st.none() | TEXT,
        "metadata": st.dictionaries(
            TEXT,
            st.none() | st.booleans() | st.integers(-(2**70), 2**70) | TEXT | FRACTIONS,
            max_size=4,
        ),
        "completed_at": st.sampled_from(["2026-11-01T12:00:30Z", "2026-11-01T12:00:30.123456+00:00"]),
    }
)  # fmt: skip


@given(st.lists(FIELDS, min_size=5, max_size=20))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_traced_run_is_rebuilt_as_conditions_saw_it(database_url, changes):
    engine = create_engine(database_url, pool_size=2)
    sent = [
        runs.run(**{**one, "usage": _plain(one["usage"]), "steps": [_plain(s) for s in one["steps"]]})
        for one in changes
    ]
    await close_out(engine, *sent)
    async with reading(engine) as conn:
        found = {one.run.key: one for one in await read_runs(conn, [run.key for run in sent])}
    await engine.dispose()
    assert len(found) == len(sent)
    for run in sent:
        assert found[run.key].unknown == frozenset()
        assert visible_fields(found[run.key].run) == visible_fields(run)


def _plain(fields):
    return {name: str(value) if isinstance(value, Decimal) else value for name, value in fields.items()}


async def test_a_trace_with_steps_of_another_kind_leaves_the_steps_unknown(engine):
    run = runs.run()
    await close_out(engine, run)
    async with engine.begin() as conn:
        await conn.execute(text("""UPDATE governance.traces SET steps = '[{"kind": "theirs"}]'"""))
    async with reading(engine) as conn:
        (found,) = await read_runs(conn, [run.key])
    assert found.unknown == {"steps", "step_count"}
    assert found.run.trace_id == run.trace_id


@pytest.mark.parametrize("size", [1, 2, 7, 100])
async def test_each_run_of_the_period_is_read_once_the_last_received_first(engine, size):
    at = [NOW - timedelta(seconds=1)] * 5 + [NOW - timedelta(days=days, hours=3) for days in (0, 9, 9, 29)]
    expected = []
    for tenant in ("acme", "globex"):
        for received in at:
            run = runs.run(tenant_id=tenant)
            await close_out(engine, run, received_at=received)
            expected.append((received, *run.key))
    for outside in (NOW, NOW + timedelta(hours=1), NOW - timedelta(days=31)):
        await close_out(engine, runs.run(), received_at=outside)
    async with reading(engine) as conn:
        found = [tuple(one) async for page in pages(conn, **MONTH, size=size) for one in page]
        own = [one.run_id async for page in pages(conn, **MONTH, tenant="globex", size=size) for one in page]
    assert found == sorted(expected, reverse=True)
    assert set(own) == {run_id for _, tenant, run_id in expected if tenant == "globex"}
    assert len(own) == 9


async def test_a_run_that_is_not_closed_out_is_omitted(engine):
    run = runs.run()
    await close_out(engine, run)
    async with engine.begin() as conn:
        await conn.execute(
            text("UPDATE governance.run_completions SET mode = 'legacy', committed_at = NULL, phase = 'NOT_STARTED'")
        )
    assert (await backtest(engine, [draft()], **MONTH)).runs == 0
    async with reading(engine) as conn:
        assert await read_runs(conn, [run.key]) == []


async def test_a_transaction_is_continued_in_another_while_runs_are_evaluated(engine, monkeypatch):
    monkeypatch.setattr(stored, "TRANSACTION_SECONDS", 0)
    monkeypatch.setattr(stored, "_RUNS_A_FETCH", 2)
    sent = [runs.run() for _ in range(7)]
    await close_out(engine, *sent)
    found, snapshots = [], []
    async with reading(engine) as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await conn.commit()
        (span,) = [span async for span in spans(conn, **MONTH)]
        async for some in stored.read_span(conn, span, None, KEYS):
            found += [row[stored.RUN] for row in some]
            async with engine.connect() as other:
                query = text("SELECT xact_start FROM pg_stat_activity WHERE pid = :pid")
                snapshots.append((await other.execute(query, {"pid": pid})).scalar_one())
    assert sorted(found) == sorted(run.run_id for run in sent)
    assert len(set(snapshots)) == len(snapshots) == 4


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("tenant", [None, "globex"])
async def test_spans_have_the_runs_of_pages(engine, size, tenant):
    for day in (0, 0, 0, 9, 9, 29):
        made = [runs.run(tenant_id=name) for name in ("acme", "globex")]
        await close_out(engine, *made, received_at=NOW - timedelta(days=day, hours=3))
    options = {**MONTH, "tenant": tenant, "size": size}
    async with reading(engine) as conn:
        listed = [[one.key for one in page] async for page in pages(conn, **options)]
        found = [span async for span in spans(conn, **options)]
        read = [
            [RunKey(*row[1:3]) async for some in stored.read_span(conn, span, tenant, KEYS) for row in some]
            for span in found
        ]
    assert read == listed
    assert [span.runs for span in found] == [len(page) for page in listed]


CONDITIONS = [
    "run.usage.cost_usd > 1.5",
    "run.status == 'failed' && run.error_message.contains('answer')",
    "run.steps.exists(s, s.status == 'failed' && s.duration_ms > 10)",
    "run.duration_ms > 1000 && run.completed_at > timestamp('2026-11-01T00:00:00Z')",
    "run.metadata.region == 'eu' || run.step_count > 1",
    "type(run.metadata.n) == int",
    "run.metadata.n == 1",
    "size(run) > 3",
    "run.steps.filter(s, s.status == 'failed').size() > 0",  # depends on the size of a run
]


@pytest.mark.parametrize("number", [None, 1, 3])
async def test_processes_give_the_same_results_as_one(engine, database_url, monkeypatch, number):
    """Each condition alone, which reads few columns, and all of them together."""
    await apply(engine, draft("cost", condition="run.usage.cost_usd < 2.5"))
    sent = [
        runs.run(
            tenant_id=f"tenant-{index % 3}",
            usage={"cost_usd": index % 4},
            trace_id=None if index % 5 == 0 else str(runs.run().trace_id),
            metadata={"region": "eu", "n": (1, 1.0, True, "1", None)[index % 5]} if index % 2 else {},
            error_message="no answer" if index % 3 else None,
        )
        for index in range(40)
    ]
    await close_out(engine, *sent)
    drafts = [draft("cost", condition=CONDITIONS[0])]
    drafts += [draft(f"p{index}", condition=condition) for index, condition in enumerate(CONDITIONS)]
    monkeypatch.setattr(module, "_RUNS_FOR_PROCESSES", 0)
    monkeypatch.setattr(module, "_RUNS_A_SPAN", 7)
    processes = None if number is None else Processes(database_url, number)

    together = await backtest(engine, drafts, **MONTH, processes=processes)

    async with reading(engine) as conn:
        read = await stored.read_runs(conn, [run.key for run in sent])
    assert together.runs == 40
    for tally in together.tallies:
        answers = Counter(ask(tally.condition, Visible(one.run, unknown=one.unknown)).answer for one in read)
        total = tally.total
        assert (total.hits, total.errors, total.unknown) == (answers["true"], answers["error"], answers["unknown"])
        assert len(tally.examples["newly"]) == min(3, tally.total.newly)
        assert len(tally.examples["errors"]) == min(3, tally.total.errors)
    for one, tally in zip(drafts, together.tallies, strict=True):
        (alone,) = (await backtest(engine, [one], **MONTH)).tallies
        assert (alone.tenants, alone.examples) == (tally.tenants, tally.examples)


async def test_large_values_are_not_remembered(engine):
    """Otherwise the memory of a backtest would grow with the runs."""
    await close_out(engine, *(runs.run(metadata={"note": f"{index} {'x' * 5_000}"}) for index in range(20)))
    evaluation = Evaluation(
        [draft(condition="run.metadata.note.startsWith('1')"), draft(condition="run.status == 'failed'")],
        {}, tenant=None, limit=0,
    )  # fmt: skip
    async with reading(engine) as conn:
        (span,) = [span async for span in spans(conn, **MONTH)]
        results = await evaluation.of_span(conn, span)
    assert results.policies[0].tenants["acme"].hits == 11
    assert evaluation.remembered == [0, 1]


async def test_processes_end_with_a_parent_that_is_killed(database_url, engine):
    await close_out(engine, *(runs.run() for _ in range(20)))
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, database_url, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout
    children = [psutil.Process(int(pid)) for pid in (await parent.stdout.readline()).split()]
    assert len(children) == 2
    parent.kill()
    await parent.wait()
    _, left = psutil.wait_procs(children, timeout=PATIENCE)
    assert left == []


# A program that evaluates in two processes, prints their ids and waits.
_PARENT = """
import asyncio, sys, multiprocessing
from datetime import UTC, datetime, timedelta
from consumer.policy_analysis.evaluation import Evaluation
from consumer.policy_analysis.processes import Processes
from consumer.postgres.engine import create_engine
from consumer.runs.pages import spans
from consumer.runs.stored import reading

async def main():
    until = datetime(2026, 11, 20, 12, tzinfo=UTC)
    async with reading(create_engine(sys.argv[1])) as conn:
        evaluation = Evaluation([], {}, tenant=None, limit=0)
        month = spans(conn, since=until - timedelta(days=30), until=until, size=1)
        found = Processes(sys.argv[1], 2).evaluate(evaluation, month)
        await anext(found)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_a_killed_process_is_reported_and_no_process_is_left(engine, database_url):
    await close_out(engine, *(runs.run() for _ in range(20)))
    evaluation = Evaluation([draft()], {}, tenant=None, limit=0)
    async with reading(engine) as conn:
        found = Processes(database_url, 2).evaluate(evaluation, spans(conn, **MONTH, size=1))
        await anext(found)
        for process in active_children():
            process.kill()
        with pytest.raises(UnavailableError, match="was killed"):
            async for _ in found:
                pass
    assert active_children() == []


async def test_processes_end_when_the_backtest_is_cancelled(engine, database_url):
    await close_out(engine, *(runs.run() for _ in range(20)))
    evaluation = Evaluation([draft()], {}, tenant=None, limit=0)
    async with reading(engine) as conn:
        found = Processes(database_url, 2).evaluate(evaluation, spans(conn, **MONTH, size=1))
        await anext(found)
        assert active_children()
        await found.aclose()
    assert active_children() == []


async def test_a_sample_is_a_random_part_of_the_runs_of_the_period(engine):
    await close_out(engine, *(runs.run(status="failed" if index % 2 else "succeeded") for index in range(300)))
    await close_out(engine, runs.run(tenant_id="globex"), received_at=NOW - timedelta(days=40))
    async with engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("ANALYZE"))
    failed = [draft(condition="run.status == 'failed'", effect="suppress_incident")]

    some = await backtest(engine, failed, **MONTH, sample_size=100)
    more = await backtest(engine, failed, **MONTH, sample_size=1_000)

    assert some.runs == 100
    assert some.sample_of is not None
    assert 250 <= some.sample_of <= 350
    low, high = share_between(some.tallies[0].total.hits, 100)
    assert low < high
    assert 10 < some.tallies[0].total.hits < 90  # 40 % of runs away from the half: a chance of 10 ** -15
    # All there are: not a sample.
    assert (more.runs, more.sample_of, more.tallies[0].total.hits) == (300, None, 150)
    assert (await backtest(engine, failed, **MONTH, sample_size=5, tenant="globex")).runs == 0


async def test_a_sample_of_many_runs_reads_random_pages(engine):
    """Enough runs for several pages of the table."""
    await close_out(engine, *(runs.run() for _ in range(500)))
    async with reading(engine) as conn:
        one, is_all = await sample(conn, 2, among=200, **MONTH)
        other = [key for _ in range(10) for key in (await sample(conn, 2, among=200, **MONTH))[0]]
        # Even if fewer are found than were asked for, because there are fewer than was estimated.
        assert not (await sample(conn, 1_000, among=10**6, **MONTH))[1]
    assert len(one) <= 2
    assert not is_all
    assert set(other) - set(one)


def test_the_interval_of_a_share_is_wilsons():
    assert share_between(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert share_between(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert share_between(0, 0) == (0.0, 1.0)


async def test_the_estimated_number_of_runs_is_that_of_the_period(engine):
    await close_out(engine, *(runs.run() for _ in range(200)), received_at=NOW - timedelta(days=20))
    await close_out(engine, *(runs.run() for _ in range(50)))
    async with engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("ANALYZE"))
    async with reading(engine) as conn:
        assert 200 <= await estimate(conn, **MONTH) <= 300
        assert await estimate(conn, since=NOW - timedelta(days=1), until=NOW) < 100


async def test_progress_is_reported_up_to_the_last_run(engine):
    await close_out(engine, *(runs.run() for _ in range(3)))
    reported = []
    await backtest(engine, [draft()], **MONTH, progress=lambda done, of: reported.append((done, of)))
    assert reported[-1][0] == 3
    assert all(done <= of for done, of in reported)


@pytest.fixture
async def select_only(engine, database_url):
    """The URL of a role that may do nothing but SELECT."""
    name = "reads_only"
    async with engine.begin() as conn:
        await conn.execute(text(f"DROP ROLE IF EXISTS {name}"))
        await conn.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD 'x'"))
        await conn.execute(text(f"GRANT USAGE ON SCHEMA governance TO {name}"))
        await conn.execute(text(f"GRANT SELECT ON ALL TABLES IN SCHEMA governance TO {name}"))
    yield (
        urlsplit(database_url)._replace(netloc=f"{name}:x@{urlsplit(database_url).netloc.rpartition('@')[2]}").geturl()
    )
    async with engine.begin() as conn:
        await conn.execute(text(f"DROP OWNED BY {name}"))
        await conn.execute(text(f"DROP ROLE {name}"))


async def content(engine):
    """Every row of every table, with the transactions that wrote or locked it."""
    async with engine.connect() as conn:
        return [
            (await conn.execute(text(f"SELECT t::text, xmin::text, xmax::text FROM {table.fullname} t"))).all()
            for table in metadata.sorted_tables
        ]


async def test_the_command_writes_nothing_and_needs_a_role_that_may_select(engine, select_only, tmp_path):
    await apply(engine, draft("expensive", condition="run.usage.cost_usd < 1.0"), draft("quiet", mode="shadow"))
    run = runs.run(usage={"cost_usd": 7.25}, trace_id=None)
    now = datetime.now(UTC)
    await close_out(engine, run, runs.run(tenant_id="globex"), received_at=now - timedelta(hours=1))
    file = tmp_path / "policies.yaml"
    file.write_text(
        "- {name: expensive, effect: flag, severity: LOW, condition: run.usage.cost_usd > 5.0}\n"
        "- {name: steps, effect: flag, severity: LOW, condition: size(run.steps) > 1}\n"
    )
    before = await content(engine)

    output = invoked(select_only, "backtest", str(file))
    assert "2 runs, received" in output
    assert "The enforced policies flagged 1, suppressed 0 incidents and failed to evaluate on 0" in output
    assert "expensive (flag LOW, all tenants): would flag 1 of 2 runs (50.0%)" in output
    assert "compared with enforced policies of this name: 1 newly, 1 no longer" in output
    assert f"newly     acme/{run.run_id}" in output
    assert "run.usage.cost_usd = 7.25" in output
    assert "unknown: the result depends on data that is not stored" in output
    document = json.loads(invoked(select_only, "backtest", str(file), "--json", "--since", "2h", "--tenant", "acme"))
    assert document["runs"] == 1
    assert document["policies"][0]["tenants"] == [
        {"tenant_id": "acme", "runs": 1, "hits": 1, "newly": 1, "no_longer": 0, "errors": 0, "unknown": 0}
    ]
    assert document["policies"][1]["total"]["unknown"] == 1

    output = invoked(select_only, "test", str(file), "--run", f"acme/{run.run_id}")
    assert "Not stored, treated as unknown: step_count, steps, trace_id" in output
    assert "holds          expensive" in output
    assert "unknown        steps" in output
    assert "run.steps is not stored" in output
    assert "Evaluation: depends on data that is not stored" in output
    output = invoked(select_only, "test", str(file), "--run", f"globex/{run.run_id}", status=1)
    assert f"run globex/{run.run_id} is not stored" in output

    assert "1 policy in shadow" in invoked(select_only, "shadow")
    assert await content(engine) == before


async def test_the_connection_of_the_backtest_refuses_every_write(engine):
    async with reading(engine) as conn:
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await conn.execute(text("DELETE FROM governance.policies"))


def test_an_invalid_time_is_a_usage_error(database_url, tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("[]")
    assert "--since: found 'a month'" in invoked(database_url, "backtest", str(file), "--since", "a month", status=2)


def invoked(database_url: str, *words: str, status: int = 0) -> str:
    done = closeout_blocking("policies", *words, DATABASE_URL=database_url)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr
