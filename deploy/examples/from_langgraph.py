"""Maps a LangGraph run, as its tracer records it (a run with ``child_runs``), to a run-completed message.

    python from_langgraph.py TENANT < run.json | closeout publish -

The tracer's times are UTC without an offset, so ``Z`` is added.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

Run = dict[str, Any]


def descendants(run: Run) -> Iterator[Run]:
    for child in run.get("child_runs") or ():
        yield child
        yield from descendants(child)


def utc(time: str) -> str:
    return time if time.endswith("Z") or "+" in time else f"{time}Z"


def step(run: Run) -> dict[str, Any]:
    return {
        "kind": run["run_type"],
        "skill": run["name"],
        "status": "failed" if run.get("error") else "succeeded",
        "started_at": utc(run["start_time"]),
        "model": ((run.get("extra") or {}).get("metadata") or {}).get("ls_model_name"),
        "input_tokens": run.get("prompt_tokens"),
        "output_tokens": run.get("completion_tokens"),
        "error_message": run.get("error"),
    }


def run_completed(run: Run, tenant_id: str) -> dict[str, Any]:
    """Return the message for *run*."""
    metadata = (run.get("extra") or {}).get("metadata") or {}
    steps = [step(child) for child in descendants(run)]
    return {
        "schema_version": 1,
        "tenant_id": tenant_id,
        "run_id": run["id"],
        "trace_id": run.get("trace_id"),
        "parent_run_id": run.get("parent_run_id"),
        "agent_id": run["name"],
        "session_id": metadata.get("thread_id"),
        "status": "failed" if run.get("error") else "succeeded",
        "error_code": run["error"].partition("(")[0] if run.get("error") else None,
        "error_message": run.get("error"),
        "started_at": utc(run["start_time"]),
        "completed_at": utc(run["end_time"]),
        "usage": {name: sum(one[name] or 0 for one in steps) for name in ("input_tokens", "output_tokens")},
        "steps": steps,
        "metadata": metadata,
    }


if __name__ == "__main__":
    print(json.dumps(run_completed(json.load(sys.stdin), sys.argv[1])))
