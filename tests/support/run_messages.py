"""Valid run-completed messages for tests, each different, with the changes of a test."""

import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import msgspec

from domains.run import CompletedRun


def message(**changes: Any) -> dict[str, Any]:
    """Return a valid message as plain values; keyword arguments replace fields, ``...`` removes one."""
    fields = {
        "schema_version": 1,
        "tenant_id": "acme",
        "run_id": str(uuid4()),
        "agent_id": "agent-1",
        "status": "failed",
        "error_code": "EXECUTION_TIMEOUT",
        "error_message": "no answer within 30 s",
        "trace_id": str(uuid4()),
        "started_at": "2026-11-01T12:00:00+00:00",
        "completed_at": "2026-11-01T12:00:30.5+00:00",
        "usage": {"cost_usd": 0.0125, "input_tokens": 1200, "output_tokens": 340},
        "model": "gpt-4o",
        "steps": [
            {"index": 0, "skill": "search", "status": "succeeded", "duration_ms": 120, "cost_usd": 0.01},
            {"index": 1, "skill": "book", "status": "failed", "duration_ms": 30000, "error_code": "SKILL_ERROR"},
        ],
        "metadata": {"region": "eu", "retries": 2},
    }
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not ...}


def body(fields: Mapping[str, Any] | None = None, **changes: Any) -> bytes:
    """Return a valid message as the bytes of its JSON."""
    return json.dumps(message(**changes) if fields is None else fields).encode()


def run(**changes: Any) -> CompletedRun:
    """Return a valid message as it is decoded."""
    return msgspec.json.decode(body(**changes), type=CompletedRun)


def run_id_of(raw: bytes) -> UUID:
    return UUID(json.loads(raw)["run_id"])
