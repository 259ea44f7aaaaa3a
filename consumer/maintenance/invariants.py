"""What must hold of every run: a table of rules, each one set-based statement that finds what breaks it."""

from typing import NamedTuple


class Invariant(NamedTuple):
    """A rule, the statement that finds what breaks it, and what that means and asks for.

    The statement selects tenant_id, run_id and a detail in words; ``SLICE(alias)`` stands for the slice's bounds.
    """

    name: str
    rule: str
    sql: str
    meaning: str
    remedy: str


_RESTORE = "closeout never leaves this behind: look for manual changes, a partial restore, or another writer"

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
        "what became of the run is not recorded, or recorded twice",
        f"{_RESTORE}; the message, if the runner still has it, says what the run's incident should be",
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
        "nobody can tell which policies the run was held against",
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
        "compare the trace id with run.finalized's; correct the runner, and close the trace by hand",
    ),
    Invariant(
        "trace-written",
        "the trace that a waiting run.finalized names exists, or the run has another one",
        # run_completions does not keep the trace id, so this can be known only while the last event is here. The trace
        # may be another run's, which named it first, and a run that has a trace under another id keeps that one.
        """
        SELECT o.tenant_id, o.run_id, 'no trace ' || (o.body::jsonb #>> '{data,trace_id}') AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o) AND o.sequence = 3
           AND o.body::jsonb #>> '{data,trace_id}' IS NOT NULL
           AND NOT EXISTS (
               SELECT FROM governance.traces t
                WHERE t.tenant_id = o.tenant_id AND t.trace_id = (o.body::jsonb #>> '{data,trace_id}')::uuid)
           AND NOT EXISTS (
               SELECT FROM governance.traces t WHERE t.tenant_id = o.tenant_id AND t.run_id = o.run_id)
        """,
        "the run asked for a trace and none was kept, though its event will name it",
        _RESTORE,
    ),
    Invariant(
        "phase-and-outbox",
        "COMMITTED runs have events in the outbox, EVENTS_PUBLISHED runs have none and say when, others have none",
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
        "events were deleted unpublished, or the run was told to be published while they wait",
        f"{_RESTORE}; events that still wait go out by themselves",
    ),
    Invariant(
        "outbox-suffix",
        "the events that a run still has in the outbox are its last ones, up to sequence 3",
        """
        SELECT o.tenant_id, o.run_id,
               'sequences ' || string_agg(o.sequence::text, ', ' ORDER BY o.sequence) AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o)
         GROUP BY o.tenant_id, o.run_id
        HAVING max(o.sequence) <> 3 OR min(o.sequence) < 1 OR count(*) <> 4 - min(o.sequence)
        """,
        "an event left before an earlier one of its run, or the last is gone: the relay no longer finds the run",
        f"{_RESTORE}; send the run's message again: a duplicate publishes what waits",
    ),
    Invariant(
        "no-orphans",
        "every row of a domain table and of the outbox belongs to a run in the inbox",
        # A running trace is the runner's, whose message may be still to come. A rollback without a run is a run that
        # never went through.
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
        "rows were written outside of a close-out, or the inbox row was deleted: a redelivery would fail on them",
        f"{_RESTORE}; delete the orphans, or restore the run's inbox row",
    ),
    Invariant(
        "finished",
        "an atomic run is finished as soon as it is seen; a legacy run's phase and committed_at agree",
        """
        SELECT r.tenant_id, r.run_id,
               r.mode || ', ' || r.phase || ', committed_at '
               || CASE WHEN r.committed_at IS NULL THEN 'not set' ELSE 'set' END AS detail
          FROM governance.run_completions r
         WHERE SLICE(r)
           AND ((r.mode = 'atomic' AND r.committed_at IS NULL)
                OR (r.phase IN ('COMMITTED', 'EVENTS_PUBLISHED')) <> (r.committed_at IS NOT NULL))
        """,
        "a close-out that must be all or nothing is half there",
        f"{_RESTORE}; report it with the run's closeout runs show",
    ),
    Invariant(
        "outbox-stale",
        "no event waits in the outbox longer than --older-than",
        """
        SELECT o.tenant_id, o.run_id,
               count(*) || ' events since ' || to_char(min(o.created_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS"Z"')
               AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o) AND o.created_at < now() - make_interval(secs => :older_than)
         GROUP BY o.tenant_id, o.run_id
        """,
        "no worker's relay runs or reaches the broker, or no queue takes the events (REQUIRE_EVENT_SUBSCRIBERS)",
        "start a worker, or closeout reconcile --repair, which publishes them now under their ids",
    ),
    Invariant(
        "legacy-stale",
        "no legacy run is unfinished longer than --older-than",
        """
        SELECT r.tenant_id, r.run_id, 'stopped at ' || r.phase AS detail
          FROM governance.run_completions r
         WHERE SLICE(r) AND r.mode = 'legacy' AND r.committed_at IS NULL
           AND r.received_at < now() - make_interval(secs => :older_than)
        """,
        "a non-atomic close-out stopped half-way and its message has not come back",
        "it cannot be repaired from here, the rest is in its message only: if closeout.parked holds that, replay it "
        "(closeout parked replay); else let the runner publish it again, unchanged. It goes on from its phase",
    ),
)
