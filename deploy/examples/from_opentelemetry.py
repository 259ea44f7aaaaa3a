"""Maps the spans of one agent run, as OTLP JSON with the GenAI conventions, to a run-completed message.

    python from_opentelemetry.py TENANT < spans.json | closeout publish -

The root span is the run: its id in hexadecimal is the run's id. Every other span is a step.
"""

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

Span = dict[str, Any]


def attributes(span: Span) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span.get("attributes", ())}


def time(nanoseconds: str) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(nanoseconds) // 1000)).isoformat()


def step(span: Span) -> dict[str, Any]:
    attrs = attributes(span)
    return {
        "kind": attrs.get("gen_ai.operation.name"),
        "skill": attrs.get("gen_ai.tool.name") or span["name"],
        "status": "failed" if span.get("status", {}).get("code") == 2 else "succeeded",
        "started_at": time(span["startTimeUnixNano"]),
        "duration_ms": (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e6,
        "model": attrs.get("gen_ai.request.model"),
        "input_tokens": attrs.get("gen_ai.usage.input_tokens"),
        "output_tokens": attrs.get("gen_ai.usage.output_tokens"),
        "error_code": attrs.get("error.type"),
        "error_message": span.get("status", {}).get("message"),
    }


def run_completed(spans: list[Span], tenant_id: str) -> dict[str, Any]:
    """Return the message for the run whose root span is among *spans*."""
    root = next(span for span in spans if not span.get("parentSpanId"))
    attrs, steps = attributes(root), [step(span) for span in spans if span is not root]
    return {
        "schema_version": 1,
        "tenant_id": tenant_id,
        "run_id": root["spanId"],
        "trace_id": root["traceId"],
        "agent_id": attrs.get("gen_ai.agent.id") or attrs.get("gen_ai.agent.name"),
        "session_id": attrs.get("gen_ai.conversation.id"),
        "status": "failed" if root.get("status", {}).get("code") == 2 else "succeeded",
        "error_code": attrs.get("error.type"),
        "error_message": root.get("status", {}).get("message"),
        "started_at": time(root["startTimeUnixNano"]),
        "completed_at": time(root["endTimeUnixNano"]),
        "usage": {name: sum(int(one[name] or 0) for one in steps) for name in ("input_tokens", "output_tokens")},
        "steps": steps,
    }


if __name__ == "__main__":
    print(json.dumps(run_completed(json.load(sys.stdin), sys.argv[1])))
