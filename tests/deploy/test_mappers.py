"""The example mappers convert the recordings of agent frameworks to messages that a worker accepts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from consumer.contract.run_message import decode

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
RECORDED = Path(__file__).parent / "recorded"

# Each recording, and the expected run: the runner's id, status, agent, session, tokens and steps.
MAPPED = {
    "opentelemetry": (
        "eee19b7ec3c1b174", "failed", "travel", "conv-5", (1200, 80), [("chat", "model-x"), ("execute_tool", None)]
    ),
    "openai_agents": (
        "trace_0123456789abcdef0123456789abcdef", "succeeded", "triage", "thread-9", (321, 45),
        [("generation", "model-y"), ("function", None)],
    ),
    "langgraph": (
        "01997000-1111-7000-8000-000000000001", "failed", "LangGraph", "t-3", (900, 30),
        [("chain", None), ("llm", "model-z"), ("tool", None)],
    ),
}  # fmt: skip
# Error codes of other systems are rewritten; nothing else is.
ADJUSTED = {"opentelemetry": {"error_code", "steps"}, "openai_agents": set(), "langgraph": {"error_code"}}


def test_every_mapper_has_a_recording():
    assert {f"from_{name}.py" for name in MAPPED} == {file.name for file in EXAMPLES.glob("from_*.py")}


@pytest.mark.parametrize("name", MAPPED)
def test_a_recorded_run_becomes_a_message_that_a_worker_accepts(name: str):
    printed = subprocess.run(
        [sys.executable, EXAMPLES / f"from_{name}.py", "acme"],
        input=(RECORDED / f"{name}.json").read_bytes(),
        capture_output=True,
        check=True,
    ).stdout
    decoded = decode(printed, max_bytes=1_048_576)
    run = decoded.run
    found = (
        run.run_ref or str(run.run_id), run.status, run.agent_id, run.session_id,
        (run.usage.input_tokens, run.usage.output_tokens), [(step.kind, step.model) for step in run.steps],
    )  # fmt: skip
    assert found == MAPPED[name]
    assert {adjustment.field for adjustment in decoded.adjustments} == ADJUSTED[name]
    assert run.trace_id is not None
    assert all(step.started_at and run.started_at <= step.started_at <= run.completed_at for step in run.steps)
    assert json.loads(printed)["tenant_id"] == run.tenant_id
