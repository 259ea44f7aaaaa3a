"""The invariants of every run: each is one set-based statement that finds the violations."""

from typing import NamedTuple


class Invariant(NamedTuple):
    """A rule, the statement that finds its violations, what they mean and what to do.

    The statement selects tenant_id, run_id and a text; ``SLICE(alias)`` is replaced by the bounds of the slice.
    """

    name: str
    rule: str
    sql: str
    meaning: str
    remedy: str


_RESTORE = "Closeout never causes this: look for manual changes, a partial restore, or another writer"

INVARIANTS = (
    Invariant(
        "one-finding",
        "a finished run has exactly one of incident and prevention record",
        """
        SELECT r.tenant_id, r.run_id,
               CASE WHEN i.run_id IS NULL THEN 'neither' ELSE 'both' END AS detail
          FROM governance.run_completions r
          LEFT JOIN governance.incidents i USING (tenant_id, run_id)
          LEFT JOIN governance.prevention_records p USING (tenant_id, run_id)
         WHERE SLICE(r) AND r.committed_at IS NOT NULL AND (i.run_id IS NULL) = (p.run_id IS NULL)
        """,
        "the outcome of the run is not recorded, or is recorded twice",
        f"{_RESTORE}; the run's message, if the runner still has it, shows the right incident",
    ),
    Invariant(
        "one-evaluation",
        "a finished run has exactly one policy evaluation",
        """
        SELECT r.tenant_id, r.run_id, 'none' AS detail
          FROM governance.run_completions r
          LEFT JOIN governance.policy_evaluations e USING (tenant_id, run_id)
         WHERE SLICE(r) AND r.committed_at IS NOT NULL AND e.run_id IS NULL
        """,
        "the policies that were evaluated on the run are unknown",
        _RESTORE,
    ),
    Invariant(
        "trace-completed",
        "no trace of a finished run is still running",
        """
        SELECT r.tenant_id, r.run_id, 'trace ' || t.trace_id || ' is running' AS detail
          FROM governance.run_completions r
          JOIN governance.traces t USING (tenant_id, run_id)
         WHERE SLICE(r) AND r.committed_at IS NOT NULL AND t.status = 'running'
        """,
        "the runner opened a trace under another id than its message named, or its message named none",
        "compare the trace id with the one in run.finalized; fix the runner, and close the trace manually",
    ),
    Invariant(
        "trace-written",
        "a finished run whose message named a trace has one, with steps if the message had any",
        """
        SELECT r.tenant_id, r.run_id,
               CASE WHEN t.run_id IS NULL THEN 'no trace' ELSE 'none of ' || r.step_count || ' steps' END AS detail
          FROM governance.run_completions r
          LEFT JOIN governance.traces t USING (tenant_id, run_id)
         WHERE SLICE(r) AND r.committed_at IS NOT NULL
           AND (r.step_count >= 0 AND t.run_id IS NULL OR r.step_count > 0 AND t.steps = '[]'::jsonb)
        """,
        "the steps of the run are lost, or the runner completed its trace without them",
        f"{_RESTORE}; a runner that completes the trace itself must write its steps",
    ),
    Invariant(
        "trace-of-run",
        "the trace that an unpublished run.finalized names is the run's own",
        # Published events are deleted from the outbox and cannot be checked.
        """
        SELECT o.tenant_id, o.run_id, 'trace ' || (o.body::jsonb #>> '{data,trace_id}') AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o) AND o.sequence = 3
           AND o.body::jsonb #>> '{data,trace_id}' IS NOT NULL
           AND NOT EXISTS (
               SELECT FROM governance.traces t
                WHERE t.tenant_id = o.tenant_id AND t.run_id = o.run_id
                  AND t.trace_id = (o.body::jsonb #>> '{data,trace_id}')::uuid)
        """,
        "the event names a trace that is not stored for this run",
        _RESTORE,
    ),
    Invariant(
        "phase-and-outbox",
        "COMMITTED runs have events in the outbox; EVENTS_PUBLISHED runs have none and a time; others have none",
        """
        SELECT r.tenant_id, r.run_id,
               r.phase || ' with ' || coalesce(o.waiting, 0) || ' events waiting, events_published_at '
               || CASE WHEN r.events_published_at IS NULL THEN 'not set' ELSE 'set' END AS detail
          FROM governance.run_completions r
          LEFT JOIN (SELECT o.tenant_id, o.run_id, count(*) AS waiting FROM governance.outbox_events o
                      WHERE SLICE(o) GROUP BY o.tenant_id, o.run_id) o USING (tenant_id, run_id)
         WHERE SLICE(r)
           AND ((r.phase = 'COMMITTED') <> (o.waiting IS NOT NULL)
                OR (r.phase = 'EVENTS_PUBLISHED') <> (r.events_published_at IS NOT NULL))
        """,
        "events were deleted before they were published, or the run was marked as published too early",
        f"{_RESTORE}; remaining events are published by the relay",
    ),
    Invariant(
        "outbox-suffix",
        "the events of a run in the outbox are its last ones, up to sequence 3",
        """
        SELECT o.tenant_id, o.run_id,
               'sequences ' || string_agg(o.sequence::text, ', ' ORDER BY o.sequence) AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o)
         GROUP BY o.tenant_id, o.run_id
        HAVING max(o.sequence) <> 3 OR min(o.sequence) < 1 OR count(*) <> 4 - min(o.sequence)
        """,
        "an event was published before an earlier one, or the last one is missing: the relay no longer finds the run",
        f"{_RESTORE}; send the run's message again: a duplicate publishes the remaining events",
    ),
    Invariant(
        "no-orphans",
        "every row of a domain table and of the outbox belongs to a run in the inbox",
        # A running trace belongs to the runner, whose message may still arrive. A rollback without a run belongs to a
        # run that was never committed.
        """
        SELECT x.tenant_id, x.run_id, string_agg(DISTINCT x.of, ', ' ORDER BY x.of) AS detail
          FROM (
               SELECT i.tenant_id, i.run_id, 'incidents' AS of FROM governance.incidents i WHERE SLICE(i)
               UNION ALL
               SELECT p.tenant_id, p.run_id, 'prevention_records' FROM governance.prevention_records p WHERE SLICE(p)
               UNION ALL
               SELECT e.tenant_id, e.run_id, 'policy_evaluations' FROM governance.policy_evaluations e WHERE SLICE(e)
               UNION ALL
               SELECT t.tenant_id, t.run_id, 'traces' FROM governance.traces t
                WHERE SLICE(t) AND t.status <> 'running'
               UNION ALL
               SELECT o.tenant_id, o.run_id, 'outbox_events' FROM governance.outbox_events o WHERE SLICE(o)
               ) x
          LEFT JOIN (SELECT r.tenant_id, r.run_id FROM governance.run_completions r WHERE SLICE(r)) r
            USING (tenant_id, run_id)
         WHERE r.run_id IS NULL
         GROUP BY x.tenant_id, x.run_id
        """,
        "rows were written outside of a close-out, or the inbox row was deleted: a redelivery would fail",
        f"{_RESTORE}; delete the orphans, or restore the run's inbox row",
    ),
    Invariant(
        "finished",
        "an atomic run is always finished; a legacy run's phase and committed_at agree",
        """
        SELECT r.tenant_id, r.run_id,
               r.mode || ', ' || r.phase || ', committed_at '
               || CASE WHEN r.committed_at IS NULL THEN 'not set' ELSE 'set' END AS detail
          FROM governance.run_completions r
         WHERE SLICE(r)
           AND ((r.mode = 'atomic' AND r.committed_at IS NULL)
                OR (r.phase IN ('COMMITTED', 'EVENTS_PUBLISHED')) <> (r.committed_at IS NOT NULL))
        """,
        "an atomic close-out is incomplete",
        f"{_RESTORE}; report it with the output of closeout runs show",
    ),
    Invariant(
        "outbox-stale",
        "no event is in the outbox longer than --older-than",
        """
        SELECT o.tenant_id, o.run_id,
               count(*) || ' events since ' || to_char(min(o.created_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS"Z"')
               AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o) AND o.created_at < now() - make_interval(secs => :older_than)
         GROUP BY o.tenant_id, o.run_id
        """,
        "no relay is running or reaches the broker, or no queue accepts the events (REQUIRE_EVENT_SUBSCRIBERS)",
        "start a worker, or run closeout reconcile --repair, which publishes the events now, with the same ids",
    ),
    Invariant(
        "legacy-stale",
        "no legacy run is unfinished after a failed write, or longer than --older-than",
        """
        SELECT r.tenant_id, r.run_id, 'stopped at ' || r.phase AS detail
          FROM governance.run_completions r
         WHERE SLICE(r) AND r.mode = 'legacy' AND r.committed_at IS NULL
           AND (r.received_at < now() - make_interval(secs => :older_than)
                OR EXISTS (SELECT FROM governance.rollbacks b
                            WHERE b.tenant_id = r.tenant_id AND b.run_id = r.run_id))
        """,
        "a legacy close-out is unfinished, and its message was not redelivered",
        "only the message can finish it: if it is in closeout.parked, replay it (closeout parked replay); otherwise "
        "the runner must publish it again, unchanged. The close-out resumes from its phase",
    ),
)
