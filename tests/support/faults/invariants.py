"""The invariants after every fault."""

from collections import defaultdict

from consumer.contract.names import (
    PARKED_QUEUE,
    RETRY_QUEUE,
    consumed_queues,
)
from tests.support import run_messages as runs
from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario

TYPES = ["incident.created", "policy.evaluated", "run.finalized"]


async def assert_invariants(scenario: Scenario, worker: RunningWorker | None = None) -> int:
    """Assert that each run is stored once in every domain, each event has one id, and all queues are empty.

    Returns the number of events that were published more than once.
    """
    await scenario.all_closed_out()
    expected = {str(runs.run_id_of(body)) for body in scenario.bodies}

    async def nothing_left() -> bool:
        return await scenario.count("outbox_events") == 0 and await scenario.unacked() == 0

    await scenario.until(nothing_left, what="an empty outbox and nothing unacked")
    for table in ("run_completions", "incidents", "policy_evaluations", "traces"):
        ids = await scenario.sql(f"SELECT run_id FROM governance.{table}")
        assert sorted(ids.split()) == sorted(expected), table
    assert await scenario.count("run_completions", "mode <> 'atomic' OR committed_at IS NULL") == 0
    events = await scenario.events()
    ids_of: dict[str, dict[str, str]] = defaultdict(dict)
    for run_id, kind, event_id in events:
        # The first of each type gives the order; a repetition must be the same event.
        assert ids_of[run_id].setdefault(kind, event_id) == event_id, f"{kind} of {run_id} changed its id"
    assert scenario.must_be_published <= {event_id for _, _, event_id in events}
    unpublished = expected - set(ids_of)
    assert not unpublished, await _describe_unpublished(scenario, unpublished, worker)
    assert [list(kinds) for kinds in ids_of.values()] == [TYPES] * len(expected)
    for queue in (PARKED_QUEUE, RETRY_QUEUE, *consumed_queues(scenario.intake_queues)):
        assert await scenario.length(queue) == 0, queue
    if worker is not None:
        for result in ("parked", "retried"):
            assert await worker.metric(f'closeout_deliveries_total{{result="{result}"}}') == 0, result
    return len(events) - 3 * len(expected)


async def _describe_unpublished(scenario: Scenario, unpublished: set[str], worker: RunningWorker | None) -> str:
    """Distinguish runs lost by the worker from those whose events the broker confirmed and lost, or returned."""
    names = ", ".join(f"'{run_id}'" for run_id in unpublished)
    rows = await scenario.sql(
        "SELECT now(), run_id, received_at, committed_at, events_published_at "
        f"FROM governance.run_completions WHERE run_id IN ({names})"
    )
    series = [f'closeout_events_unroutable_total{{type="{kind}"}}' for kind in TYPES]
    returned = [await worker.metric(name) for name in series] if worker is not None else "unknown"
    return f"no events of {len(unpublished)} runs; the broker returned {returned}\n{rows}\n{scenario.rabbit.log_tail()}"
