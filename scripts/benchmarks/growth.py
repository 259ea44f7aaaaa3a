"""Throughput, memory and fairness as the number of stored, queued and one tenant's runs grows."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil

from benchmarks.arena import Arena
from benchmarks.messages import bodies
from benchmarks.race import Lap, backlog, lap, running, until_finished
from benchmarks.subjects import closeout

MEBIBYTE = 1024 * 1024
TENANT_ROWS = "'tenant-' || i % 50, md5(i::text)::uuid"
# Runs of usual size with random ids, so that the indexes are as large as in production.
STORED = (
    """INSERT INTO governance.run_completions (tenant_id, run_id, agent_id, status, payload_digest, model, cost_usd,
    input_tokens, output_tokens, started_at, completed_at, is_synthetic, metadata, received_at, phase, mode,
    committed_at, events_published_at) SELECT {key}, 'agent-1', 'succeeded', sha256(i::text::bytea), 'gpt-4o', 0.0125,
    1200, 340, now() - interval '9 days', now() - interval '9 days', false, '{{"region": "eu"}}',
    now() - interval '9 days', 'EVENTS_PUBLISHED', 'atomic', now() - interval '9 days', now() - interval '9 days'
    {rows}""",
    """INSERT INTO governance.incidents (tenant_id, run_id, incident_id, outcome, severity, category, status, title,
    is_synthetic, created_at) SELECT {key}, uuidv7(), 'SUCCESS', 'NONE', 'EXECUTION_SUCCESS', 'CLOSED', 'Run succeeded',
    false, now() {rows}""",
    """INSERT INTO governance.policy_evaluations (tenant_id, run_id, policy_evaluation_id, outcome, policies_checked,
    violations, errors, evaluated_at) SELECT {key}, uuidv7(), 'no_violation', 3, '[]', '[]', now() {rows}""",
    """INSERT INTO governance.traces (tenant_id, run_id, trace_id, agent_id, status, started_at, completed_at, steps)
    SELECT {key}, md5('trace' || i)::uuid, 'agent-1', 'completed', now(), now(),
    '[{steps}, {steps}, {steps}, {steps}, {steps}]' {rows}""",
)
STEP = '{"index": 0, "skill": "search", "status": "succeeded", "duration_ms": 120, "cost_usd": 0.01}'
CHUNK = 250_000


def store(arena: Arena, already: int, until: int) -> None:
    """Raise the number of stored runs from *already* to *until*."""
    for start in range(already, until, CHUNK):
        rows = f"FROM generate_series({start + 1}, {min(start + CHUNK, until)}) AS i"
        for statement in STORED:
            arena.sql(statement.format(key=TENANT_ROWS, rows=rows, steps=STEP))
    arena.sql("VACUUM ANALYZE")
    arena.sql("CHECKPOINT")  # so that these rows are not written to disk during a lap


def rates(arena: Arena, steps: tuple[int, ...], rounds: int, logs: Path) -> Iterator[tuple[int, list[Lap]]]:
    """Yield Closeout's laps for each number of stored runs."""
    stored = 0
    for step in steps:
        store(arena, stored, step)
        stored = step
        # Each lap has its own seed: the same runs again would be duplicates.
        yield step, [lap(arena, closeout(), 1 + step + round_, logs, keep=True) for round_ in range(rounds)]


def memory(arena: Arena, runs: int, logs: Path) -> list[tuple[int, float]]:
    """Return pairs of closed-out runs and the worker's memory in MiB while it processes a backlog of *runs*."""
    arena.empty()
    subject = closeout()
    for seed in range(0, runs, 10_000):
        backlog(arena, subject, bodies(min(10_000, runs - seed), seed))
    seen: list[tuple[int, float]] = []
    with running(subject, arena.environment, logs) as processes:
        worker = psutil.Process(processes[0].pid)
        while not seen or seen[-1][0] < runs:
            until_finished(arena, processes, min(runs, (seen[-1][0] if seen else 0) + runs // 30))
            seen.append((arena.finished_runs(), worker.memory_info().rss / MEBIBYTE))
    return seen


def fairness(arena: Arena, queued: int, logs: Path) -> dict[str, float]:
    """Queue *queued* runs of one tenant, then 100 of another; return how many of the first committed after the last."""
    arena.empty()
    subject = closeout()
    for seed in range(0, queued, 10_000):
        backlog(arena, subject, bodies(min(10_000, queued - seed), seed, tenant="large"))
    backlog(arena, subject, bodies(100, queued + 1, tenant="small"))
    started = time.monotonic()
    with running(subject, arena.environment, logs) as processes:
        until_finished(arena, processes, queued + 100)
    behind = arena.sql(
        "SELECT count(*) FROM governance.run_completions WHERE tenant_id = 'large' AND committed_at > "
        "(SELECT max(committed_at) FROM governance.run_completions WHERE tenant_id = 'small')"
    )
    return {
        "seconds for all": time.monotonic() - started,
        "runs of the large tenant committed last": float(behind[0]),
        "rollbacks": float(arena.sql("SELECT count(*) FROM governance.rollbacks")[0]),
    }


def flatness(seen: list[tuple[int, float]]) -> float:
    """Return the growth of the median memory from the first to the last third, as a fraction."""
    third = len(seen) // 3
    return median(mib for _, mib in seen[-third:]) / median(mib for _, mib in seen[:third]) - 1
