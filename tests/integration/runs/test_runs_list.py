"""``closeout runs list``: each filter, and each pair of them, selects what the stored rows say."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
from sqlalchemy import text

from consumer import create_transaction_coordinator
from consumer.closeout.inbox import Arrival
from consumer.phases import TransactionPhase
from consumer.runs.lookup import list_runs
from tests.support import run_messages as runs
from tests.support.command_line import closeout

NOW = datetime.now(UTC)
# Each filter, and whether a run with these fields matches. Every one selects some of the runs and not all of them.
FILTERS: dict[str, tuple[Any, Callable[..., bool]]] = {
    "tenant": ("globex", lambda run, _: run.tenant_id == "globex"),
    "phase": (TransactionPhase.COMMITTED, lambda run, _: run.agent_id != "agent-1"),
    "status": ("failed", lambda run, _: run.status == "failed"),
    "session": ("s-1", lambda run, _: run.session_id == "s-1"),
    "agent": ("agent-2", lambda run, _: run.agent_id == "agent-2"),
    "model": ("gpt-4o", lambda run, _: run.model == "gpt-4o"),
    "error_code": ("EXECUTION_TIMEOUT", lambda run, _: run.error_code == "EXECUTION_TIMEOUT"),
    "severity": ("NONE", lambda run, _: run.status == "succeeded"),
    "since": (NOW - timedelta(hours=5), lambda _, hours: hours < 5),
    "until": (NOW - timedelta(hours=2), lambda _, hours: hours >= 2),
}


@pytest.fixture
async def stored(engine):
    """Return sixty runs of the last twelve days with the hours since each was received."""
    made = []
    for index in range(60):
        failed = index % 3 == 0
        run = runs.run(
            tenant_id="globex" if index % 2 else "acme",
            status="failed" if failed else "succeeded",
            error_code="EXECUTION_TIMEOUT" if failed else None,
            agent_id=f"agent-{index % 5}",
            model="gpt-4o" if index % 4 else "claude",
            session_id=f"s-{index % 6}" if index % 7 else None,
        )
        made.append((run, index / 5 if index < 50 else 24 * (index - 48)))
    arrivals = [Arrival.of(run)._replace(received_at=NOW - timedelta(hours=hours, seconds=1)) for run, hours in made]
    await create_transaction_coordinator(engine=engine).execute_many(arrivals)
    async with engine.begin() as conn:
        await conn.execute(
            text("UPDATE governance.run_completions SET phase = 'EVENTS_PUBLISHED' WHERE agent_id = 'agent-1'")
        )
    return made


@pytest.mark.parametrize("size", [1, 5, 1_000])
async def test_each_filter_and_each_pair_selects_the_newest_runs_that_match(engine, stored, size):
    for names in [(), *combinations(FILTERS, 1), *combinations(FILTERS, 2)]:
        chosen: dict[str, Any] = {name: FILTERS[name][0] for name in names}
        expected = [run.run_id for run, hours in stored if all(FILTERS[name][1](run, hours) for name in names)]
        found = await list_runs(engine, limit=size, **chosen)
        assert [row["run_id"] for row in found] == expected[:size], names


async def test_the_command_has_every_filter(database_url, stored):
    words = [
        "--tenant", "globex", "--agent", "agent-4", "--model", "gpt-4o", "--error-code", "EXECUTION_TIMEOUT",
        "--status", "failed", "--since", "6h", "--until", "1h", "--phase", "COMMITTED",
    ]  # fmt: skip
    done = await closeout("runs", "list", "--json", *words, DATABASE_URL=database_url)
    assert done.returncode == 0, done.stderr
    expected = [
        str(run.run_id)
        for run, hours in stored
        if (run.tenant_id, run.agent_id, run.status, run.model) == ("globex", "agent-4", "failed", "gpt-4o")
        and 1 <= hours < 6
    ]
    assert [run["run_id"] for run in json.loads(done.stdout)] == expected != []
    low = await closeout("runs", "list", "--json", "--severity", "NONE", "--limit", "3", DATABASE_URL=database_url)
    assert {run["severity"] for run in json.loads(low.stdout)} == {"NONE"}


@pytest.mark.parametrize("words", [["--since", "yesterday"], ["--until", "5"], ["--severity", "none"]])
async def test_an_invalid_filter_is_a_usage_error_that_names_it(database_url, words):
    done = await closeout("runs", "list", *words, DATABASE_URL=database_url)
    assert done.returncode == 2
    assert words[0] in done.stderr
