"""Maps a trace of the OpenAI Agents SDK, as its processors export it, to a run-completed message.

    python from_openai_agents.py TENANT < trace.json | closeout publish -

The file has one list: the trace's ``export()`` and those of its spans.
"""

import json
import sys
from typing import Any

Item = dict[str, Any]


def step(span: Item) -> Item:
    data, error = span["span_data"], span.get("error") or {}
    usage = data.get("usage") or {}
    return {
        "kind": data["type"],
        "skill": data.get("name") or data["type"],
        "status": "failed" if error else "succeeded",
        "started_at": span["started_at"],
        "model": data.get("model"),
        "input_tokens": usage.get("input_tokens"),
        "output_tokens": usage.get("output_tokens"),
        "error_message": error.get("message"),
    }


def run_completed(items: list[Item], tenant_id: str) -> Item:
    """Return the message for the trace in *items*."""
    trace = next(item for item in items if item["object"] == "trace")
    spans = sorted((item for item in items if item["object"] == "trace.span"), key=lambda span: span["started_at"])
    root = next(span for span in spans if span["span_data"]["type"] == "agent" and not span["parent_id"])
    steps, error = [step(span) for span in spans if span is not root], root.get("error") or {}
    return {
        "schema_version": 1,
        "tenant_id": tenant_id,
        "run_id": trace["id"],
        "trace_id": trace["id"].removeprefix("trace_"),
        "agent_id": root["span_data"]["name"],
        "session_id": trace.get("group_id"),
        "status": "failed" if error else "succeeded",
        "error_code": "AGENT_CRASH" if error else None,
        "error_message": error.get("message"),
        "started_at": root["started_at"],
        "completed_at": root["ended_at"],
        "usage": {name: sum(one[name] or 0 for one in steps) for name in ("input_tokens", "output_tokens")},
        "steps": steps,
        "metadata": {"workflow": trace["workflow_name"], **(trace.get("metadata") or {})},
    }


if __name__ == "__main__":
    print(json.dumps(run_completed(json.load(sys.stdin), sys.argv[1])))
