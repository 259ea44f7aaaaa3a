"""Commands that people wait for, over stored runs: this version next to another checkout's, as ratios.

The database has PostgreSQL's default settings. The runs have five steps and random ids, fifty tenants and thirty days;
one in seven did not succeed.
"""

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from demo_run.setup import closeout as run_command
from rich.console import Console
from rich.table import Table
from servers import PostgresServer

THIS, OTHER, LIMIT = "this version", "the other version", "the same joins as one statement"
_CHUNK = 250_000
_FROM = "FROM generate_series({first}, {last}) AS i"
_KEY = "'tenant-' || i * 7919::bigint % 50, md5(i::text)::uuid"
_AT = "now() - interval '30 days' * (1 - i / {runs}::float8)"
_SUCCEEDED = "i % 7 <> 0"
_STEP = """jsonb_build_object('index', step, 'skill', 'search', 'status',
    CASE WHEN i % 7 = 0 AND step = 4 THEN 'failed' ELSE 'succeeded' END, 'duration_ms', 100 + (i + step) % 4000,
    'cost_usd', '0.01', 'error_code', null, 'kind', 'tool', 'started_at', null, 'model', null, 'input_tokens', 100,
    'output_tokens', 20, 'error_message', null)"""
_STORED = (
    f"""INSERT INTO governance.run_completions (tenant_id, run_id, agent_id, status, error_code, payload_digest, model,
        cost_usd, input_tokens, output_tokens, started_at, completed_at, is_synthetic, metadata, received_at, phase,
        mode, committed_at, events_published_at, step_count, session_id)
    SELECT {_KEY}, 'agent-' || i % 200, CASE WHEN {_SUCCEEDED} THEN 'succeeded' ELSE 'failed' END,
        CASE WHEN {_SUCCEEDED} THEN NULL ELSE 'STEP_FAILURE' END, sha256(i::text::bytea), 'gpt-4o', i % 1000 / 100.0,
        1200, 340, {_AT} - interval '30 s', {_AT}, i % 100 = 0, '{{{{"region": "eu", "attempt": 2}}}}', {_AT},
        'EVENTS_PUBLISHED', 'atomic', {_AT}, {_AT}, 5, 'session-' || i / 10 {_FROM}""",
    f"""INSERT INTO governance.incidents (tenant_id, run_id, incident_id, outcome, severity, category, status, title,
        is_synthetic, created_at)
    SELECT {_KEY}, uuidv7(), CASE WHEN {_SUCCEEDED} THEN 'SUCCESS' ELSE 'FAILURE' END, 'NONE', 'EXECUTION_SUCCESS',
        'CLOSED', 'Run ended', false, {_AT} {_FROM}""",
    f"""INSERT INTO governance.policy_evaluations (tenant_id, run_id, policy_evaluation_id, outcome, policies_checked,
        violations, errors, evaluated_at)
    SELECT {_KEY}, uuidv7(), 'no_violation', 3, '[]', '[]', {_AT} {_FROM}""",
    f"""INSERT INTO governance.traces (tenant_id, run_id, trace_id, agent_id, status, started_at, completed_at, steps)
    SELECT {_KEY}, md5('trace' || i)::uuid, 'agent-' || i % 200, 'completed', {_AT} - interval '30 s', {_AT},
        (SELECT jsonb_agg({_STEP}) FROM generate_series(0, 4) step) {_FROM}""",
)
# What reconcile compares, for PostgreSQL to plan as it likes.
_JOINS = """
    SELECT count(*) FROM governance.run_completions r
      LEFT JOIN governance.incidents i USING (tenant_id, run_id)
      LEFT JOIN governance.prevention_records p USING (tenant_id, run_id)
      LEFT JOIN governance.policy_evaluations e USING (tenant_id, run_id)
      LEFT JOIN governance.traces t USING (tenant_id, run_id)
      LEFT JOIN (SELECT tenant_id, run_id, count(*) AS waiting FROM governance.outbox_events GROUP BY 1, 2) o
           USING (tenant_id, run_id)
     WHERE r.committed_at IS NOT NULL
       AND ((i.run_id IS NULL) = (p.run_id IS NULL) OR e.run_id IS NULL OR t.status = 'running'
            OR (r.step_count >= 0 AND t.run_id IS NULL) OR (r.phase = 'COMMITTED') <> (o.waiting IS NOT NULL))
"""
_POLICIES = """
- {name: expensive, effect: flag, severity: HIGH, condition: run.usage.cost_usd > 5.0}
- {name: failure, effect: flag, severity: HIGH, condition: "run.status == 'failed' && run.error_code != null"}
- {name: failed step, effect: flag, severity: LOW, condition: "run.steps.exists(s, s.status == 'failed')"}
- {name: test, effect: suppress_incident, severity: LOW, condition: "run.is_synthetic && run.metadata.region == 'eu'"}
"""


def compare(folder: Path, console: Console, other: Path, rounds: int, runs: int) -> dict[str, Any]:
    """Store *runs*, time each command of both versions in turn, and return the seconds and ratios of each."""
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "policies.yaml").write_text(_POLICIES)
    server = PostgresServer(folder / "postgresql")
    try:
        server.start()
        environment = {"DATABASE_URL": server.create_database("closeout")}
        run_command(environment, "migrate")
        _store(server, runs)
        console.print(f"{runs:,} runs stored")
        return _race(_subjects(server, environment, folder, other), console, rounds)
    finally:
        server.kill()


def _store(server: PostgresServer, runs: int) -> None:
    for first in range(1, runs + 1, _CHUNK):
        for statement in _STORED:
            last = min(first + _CHUNK - 1, runs)
            server.psql(statement.format(first=first, last=last, runs=runs), "closeout")
    for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
        server.psql(statement, "closeout")


_Subjects = dict[str, dict[str, Callable[[], object]]]


def _subjects(server: PostgresServer, environment: Mapping[str, str], folder: Path, other: Path) -> _Subjects:
    """Return what is timed: the command, and who runs it."""
    ours = Path(__file__).parents[2] / ".venv" / "bin" / "closeout"
    file = str(folder / "policies.yaml")
    backtest = ("policies", "backtest", file, "--since", "31d", "--limit-examples", "3")
    commands: dict[str, tuple[str, ...]] = {
        "reconcile": ("reconcile",),
        "policies backtest": backtest,
        "runs list": ("runs", "list"),
        "runs list --status": ("runs", "list", "--status", "halted"),
        "outbox status": ("outbox", "status"),
    }
    subjects: _Subjects = {
        name: {THIS: _command(ours, environment, *words), OTHER: _command(other, environment, *words)}
        for name, words in commands.items()
    }
    subjects["reconcile"][LIMIT] = lambda: server.psql(_JOINS, "closeout")
    # What the other version lacks is compared with its complete command.
    subjects["policies backtest --sample 1000"] = {THIS: _command(ours, environment, *backtest, "--sample", "1000")}
    subjects["reconcile --since 1d"] = {THIS: _command(ours, environment, "reconcile", "--since", "1d")}
    return subjects


def _command(program: Path, environment: Mapping[str, str], *words: str) -> Callable[[], object]:
    # The path of this program's modules would lead the other version to this one's code.
    variables = {**os.environ, **environment, "PYTHONPATH": ""}
    return lambda: subprocess.run([program, *words], env=variables, check=True, capture_output=True)


def _race(subjects: _Subjects, console: Console, rounds: int) -> dict[str, Any]:
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for name, by_subject in subjects.items():
            # Forwards, then backwards, so that no subject always runs first.
            for subject in list(by_subject) if number % 2 == 0 else list(by_subject)[::-1]:
                started = time.monotonic()
                by_subject[subject]()
                seconds[name][subject].append(time.monotonic() - started)
                console.print(
                    f"round {number + 1}  {name:32} {subject:32} {seconds[name][subject][-1]:8.2f} s", style="dim"
                )
    table = Table("", THIS, OTHER, "faster by the factor (min to max)", box=None)
    found: dict[str, Any] = {}
    for name, timed in seconds.items():
        others = timed.get(OTHER) or seconds[name.partition(" --")[0]][OTHER]
        factors = [other / ours for ours, other in zip(timed[THIS], others, strict=True)]
        found[name] = {"seconds": timed, "factor": median(factors), "factors": factors}
        table.add_row(
            name, f"{median(timed[THIS]):,.2f} s", f"{median(others):,.2f} s",
            f"{median(factors):.2f} ({min(factors):.2f} to {max(factors):.2f})",
        )  # fmt: skip
    console.print(table)
    ours, limit = seconds["reconcile"][THIS], seconds["reconcile"][LIMIT]
    over = [mine / joins for mine, joins in zip(ours, limit, strict=True)]
    found["reconcile"]["times the joins"] = over
    console.print(f"reconcile takes {median(over):.2f} ({min(over):.2f} to {max(over):.2f}) times as long as {LIMIT}")
    return found
