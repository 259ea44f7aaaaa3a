"""Generates realistic runs from a seed: most succeed, some fail, halt or are aborted."""

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

TENANTS = ("acme", "globex", "initech", "northwind")
MODELS = (("gpt-4o", 0.012), ("claude-sonnet", 0.009), ("small-local", 0.0003))
SKILLS = ("search", "read_page", "summarize", "write_file", "run_tests", "send_mail", "query_database")
# status, error code, share of all runs
ENDINGS: tuple[tuple[str, str | None, float], ...] = (
    ("succeeded", None, 0.80),
    ("failed", "EXECUTION_TIMEOUT", 0.04),
    ("failed", "SKILL_ERROR", 0.05),
    ("failed", "AGENT_CRASH", 0.01),
    ("failed", "GOAL_NOT_REACHED", 0.03),
    ("failed", "RETRY_EXHAUSTED", 0.01),
    ("halted", "BUDGET_EXCEEDED", 0.02),
    ("halted", "RATE_LIMIT_EXCEEDED", 0.01),
    ("aborted", "CANCELLED", 0.02),
    ("aborted", "MANUAL_STOP", 0.01),
)


def realistic_runs(number: int, seed: int, *, steps: int | None = None) -> list[bytes]:
    """Return *number* run-completed messages. The same *seed* gives the same messages, except for their times.

    Each has *steps* steps, or one to twelve if *steps* is ``None``.
    """
    source = random.Random(seed)  # noqa: S311 - for variety, not for secrets
    now = datetime.now(UTC)
    return [json.dumps(_run(source, now, steps or source.randint(1, 12))).encode() for _ in range(number)]


def _run(source: random.Random, now: datetime, number_of_steps: int) -> dict[str, Any]:
    status, error, _ = source.choices(ENDINGS, [share for *_, share in ENDINGS])[0]
    model, price = source.choices(MODELS, (5, 4, 1))[0]
    steps = [_step(source, index, price) for index in range(number_of_steps)]
    if status == "failed":
        steps[-1].update(status="failed", error_code=error)
    tokens = source.randint(500, 30_000)
    completed = now - timedelta(seconds=source.uniform(0, 2))
    return {
        "schema_version": 1,
        "tenant_id": source.choice(TENANTS),
        "run_id": str(UUID(int=source.getrandbits(128), version=4)),
        "agent_id": f"agent-{source.randint(1, 20)}",
        "status": status,
        "error_code": error,
        "error_message": f"the run ended with {error}" if error else None,
        "trace_id": str(UUID(int=source.getrandbits(128), version=4)) if source.random() < 0.9 else None,
        "started_at": (completed - timedelta(milliseconds=sum(s["duration_ms"] for s in steps))).isoformat(),
        "completed_at": completed.isoformat(),
        "usage": {
            "cost_usd": round(sum(step["cost_usd"] for step in steps), 6),
            "input_tokens": tokens,
            "output_tokens": tokens // 6,
        },
        "model": model,
        "steps": steps,
        "is_synthetic": source.random() < 0.05,
        "metadata": {"region": source.choice(("eu", "us")), **({"retries": 1} if source.random() < 0.95 else {})},
    }


def _step(source: random.Random, index: int, price: float) -> dict[str, Any]:
    return {
        "index": index,
        "skill": source.choice(SKILLS),
        "status": "succeeded",
        "duration_ms": int(source.lognormvariate(6, 1)),
        "cost_usd": round(price * source.uniform(0.5, 6), 6),
        "error_code": None,
    }
