"""All tables; importing this module completes :data:`domains.database.schema.metadata`."""

from domains.completions import outbox_events, rollbacks, run_completions
from domains.database.schema import metadata
from domains.incidents.tables import incidents, prevention_records
from domains.policies.tables import policies, policy_evaluations
from domains.traces.tables import traces

__all__ = [
    "incidents",
    "metadata",
    "outbox_events",
    "policies",
    "policy_evaluations",
    "prevention_records",
    "rollbacks",
    "run_completions",
    "traces",
]
