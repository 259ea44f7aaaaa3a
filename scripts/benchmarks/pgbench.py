"""pgbench writes the same rows with prepared statements, one transaction per run; without Python and a broker."""

import json
import re
import subprocess
import tempfile
from datetime import UTC, datetime

import msgspec
from servers.binaries.postgres import find_postgres
from servers.process import ServerError

from benchmarks.arena import Arena
from benchmarks.messages import bodies
from consumer.contract.events import events_for
from consumer.contract.run_message import decode
from domains.incidents.rules import finding_for
from domains.policies.rules import PolicySet, evaluate

SECONDS = 6
# The fastest on two cores: 4, 8, 16, 32 clients reached 2,783 3,572 3,711 3,205 runs/s (medians of two rounds).
CLIENTS = 16

_SCRIPT = """
BEGIN;
INSERT INTO governance.run_completions (tenant_id, run_id, agent_id, status, error_code, payload_digest, message_id,
  model, cost_usd, input_tokens, output_tokens, started_at, completed_at, is_synthetic, synthetic_scenario_id, metadata,
  received_at, phase, mode, committed_at)
VALUES (<tenant>, gen_random_uuid(), <agent>, <status>, <code>, sha256('some content'), NULL, <model>, 0.0125,
  1200, 340, <at>, <at>, false, NULL, <metadata>, <at>, 'COMMITTED', 'atomic', clock_timestamp())
ON CONFLICT DO NOTHING RETURNING run_id \\gset
INSERT INTO governance.incidents (tenant_id, run_id, incident_id, outcome, severity, category, status, title,
  error_code, error_message, agent_id, is_synthetic, synthetic_scenario_id, created_at)
VALUES (<tenant>, :run_id, uuidv7(), 'SUCCESS', 'NONE', 'EXECUTION_SUCCESS', 'CLOSED', <title>, <code>, NULL, <agent>,
  false, NULL, <at>);
INSERT INTO governance.policy_evaluations (tenant_id, run_id, policy_evaluation_id, outcome, policies_checked,
  violations, errors, evaluated_at)
VALUES (<tenant>, :run_id, uuidv7(), 'no_violation', 3, '[]', '[]', <at>);
INSERT INTO governance.traces (tenant_id, trace_id, run_id, agent_id, status, started_at, completed_at, steps)
VALUES (<tenant>, gen_random_uuid(), :run_id, <agent>, 'completed', <at>, <at>, <steps>)
ON CONFLICT DO NOTHING RETURNING run_id;
INSERT INTO governance.outbox_events (tenant_id, run_id, sequence, event_id, type, routing_key, body)
VALUES <events>;
COMMIT;
"""

# Closeout's writes after the events' confirms, here in a separate transaction per run.
_MARK = """
WITH gone AS (DELETE FROM governance.outbox_events WHERE tenant_id = <tenant> AND run_id = :run_id::uuid
  RETURNING tenant_id, run_id, sequence)
UPDATE governance.run_completions AS r SET phase = 'EVENTS_PUBLISHED', events_published_at = clock_timestamp()
FROM gone WHERE gone.sequence = 3 AND r.tenant_id = gone.tenant_id AND r.run_id = gone.run_id AND r.phase = 'COMMITTED';
"""


def tps(arena: Arena, *, mark: bool) -> float:
    """Return runs per second; with *mark* including Closeout's writes after the events' confirms."""
    return _tps(arena, CLIENTS, script(mark=mark))


def script(*, mark: bool) -> str:
    """Return pgbench's script for one run with realistic values."""
    body = bodies(1, 7)[0]
    run = decode(body, max_bytes=len(body)).run
    now = datetime.now(UTC)
    evaluation = evaluate(run, PolicySet(()), now=now)
    events = events_for(run, finding_for(run, suppressed_by=None, now=now), evaluation, trace_id=run.trace_id, now=now)
    values = {
        "tenant": _text(run.tenant_id),
        "agent": _text(run.agent_id),
        "status": _text(run.status),
        "code": _text(run.error_code),
        "model": _text(run.model),
        "title": _text("The run succeeded"),
        "metadata": _json(msgspec.json.encode(run.metadata)),
        "steps": _json(msgspec.json.encode(run.steps)),
        "at": f"'{now.isoformat()}'::timestamptz",
        "events": ", ".join(
            f"(<tenant>, :run_id::uuid, {event.sequence}, uuidv7(), {_text(event.type)}, {_text(event.routing_key)}, "
            f"{_json(event.body.encode())})"
            for event in events
        ),
    }
    text = (_SCRIPT + _MARK if mark else _SCRIPT).replace("<events>", values.pop("events"))
    return re.sub(r"<(\w+)>", lambda found: values[found[1]], text)


def _tps(arena: Arena, clients: int, text: str) -> float:
    arena.empty()
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(
            [str(find_postgres() / "pgbench"), "--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=2",
             f"--time={SECONDS}", f"--file={file.name}", arena.environment["DATABASE_URL"]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    found = re.search(r"tps = ([0-9.]+)", done.stdout)
    if done.returncode or found is None or "aborted" in done.stderr:
        raise ServerError(f"pgbench: {done.stdout}{done.stderr}")
    return float(found[1])


def _text(value: str | None) -> str:
    return "NULL" if value is None else "'" + value.replace("'", "''") + "'"


def _json(encoded: bytes) -> str:
    # A space follows each colon, because pgbench reads :null as a variable.
    return _text(json.dumps(json.loads(encoded)))
