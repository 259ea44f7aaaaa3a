"""The invariants of every run, as conditions on the rows of a source, or as statements that find the violations.

A condition asks for another table's row with a scalar subquery, which PostgreSQL evaluates by index, and only for the
few rows that the rest of the condition leaves.
"""

from typing import NamedTuple

from consumer.maintenance.sources import KEYS, RUNS, TRACES, WAITING


class Invariant(NamedTuple):
    """A rule, how its violations are found, what they mean and what to do. No violation is found twice."""

    name: str
    rule: str
    checks: "tuple[Check | Statement, ...]"
    meaning: str
    remedy: str


class Check(NamedTuple):
    """Conditions on a row of *source*: whether it violates the rule, and a text that says how."""

    source: str
    condition: str
    detail: str


class Statement(NamedTuple):
    """A query for tenant_id, run_id and detail of each violation."""

    sql: str
    # Whether it reads rows that belong to no run.
    of_orphans: bool = False


def _then(condition: str, value: str) -> str:
    """Return *condition* AND *value*. PostgreSQL evaluates the parts of an AND on any row, but a CASE in this order."""
    return f"CASE WHEN {condition} THEN {value} ELSE false END"


def _run_of(alias: str, value: str) -> str:
    """Return *value* of the run ``c`` that a row belongs to; null without a run."""
    return (
        f"(SELECT {value} FROM governance.run_completions c "  # noqa: S608 - constants
        f"WHERE c.tenant_id = {alias}.tenant_id AND c.run_id = {alias}.run_id)"
    )


# Of a large value, which is stored elsewhere, only the size is read.
_WITHOUT_STEPS = _then("pg_column_size(t.steps) < 16", "t.steps = '[]'::jsonb")
_EVENTS = "(SELECT count(*) FROM governance.outbox_events o WHERE o.tenant_id = r.tenant_id AND o.run_id = r.run_id)"
_COMMITTED = "r.phase = 'COMMITTED'"
_PUBLISHED_AT = "CASE WHEN {0}.events_published_at IS NULL THEN 'not set' ELSE 'set' END"
_MARK_AND_TIME = "({0}.phase = 'EVENTS_PUBLISHED') <> ({0}.events_published_at IS NOT NULL)"

_RESTORE = "Closeout never causes this: look for manual changes, a partial restore, or another writer"

INVARIANTS = (
    Invariant(
        "one-finding",
        "a finished run has exactly one of incident and prevention record",
        (
            Check(
                KEYS,
                _then("(i.run_id IS NULL) = (p.run_id IS NULL)", _run_of("r", "c.committed_at IS NOT NULL")),
                "CASE WHEN i.run_id IS NULL THEN 'neither' ELSE 'both' END",
            ),
        ),
        "the outcome of the run is not recorded, or is recorded twice",
        f"{_RESTORE}; the run's message, if the runner still has it, shows the right incident",
    ),
    Invariant(
        "one-evaluation",
        "a finished run has exactly one policy evaluation",
        (Check(KEYS, _then("e.run_id IS NULL", _run_of("r", "c.committed_at IS NOT NULL")), "'none'"),),
        "the policies that were evaluated on the run are unknown",
        _RESTORE,
    ),
    Invariant(
        "trace-completed",
        "no trace of a finished run is still running",
        (
            Check(
                TRACES,
                _then("t.status = 'running'", _run_of("t", "c.committed_at IS NOT NULL")),
                "'trace ' || t.trace_id || ' is running'",
            ),
        ),
        "the runner opened a trace under another id than its message named, or its message named none",
        "compare the trace id with the one in run.finalized; fix the runner, and close the trace manually",
    ),
    Invariant(
        "trace-written",
        "a finished run whose message named a trace has one, with steps if the message had any",
        (
            Check(
                KEYS,
                _then("t.run_id IS NULL", _run_of("r", "c.committed_at IS NOT NULL AND c.step_count >= 0")),
                "'no trace'",
            ),
            Check(
                TRACES,
                _then(_WITHOUT_STEPS, _run_of("t", "c.committed_at IS NOT NULL AND c.step_count > 0")),
                f"'none of ' || {_run_of('t', 'c.step_count')} || ' steps'",
            ),
        ),
        "the steps of the run are lost, or the runner completed its trace without them",
        f"{_RESTORE}; a runner that completes the trace itself must write its steps",
    ),
    Invariant(
        "trace-of-run",
        "the trace that an unpublished run.finalized names is the run's own",
        # Published events are deleted from the outbox and cannot be checked.
        (
            Statement("""
        SELECT o.tenant_id, o.run_id, 'trace ' || (o.body::jsonb #>> '{data,trace_id}') AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o) AND o.sequence = 3
           AND o.body::jsonb #>> '{data,trace_id}' IS NOT NULL
           AND NOT EXISTS (
               SELECT FROM governance.traces t
                WHERE ALSO(t) AND t.tenant_id = o.tenant_id AND t.run_id = o.run_id
                  AND t.trace_id = (o.body::jsonb #>> '{data,trace_id}')::uuid)
        """),
        ),
        "the event names a trace that is not stored for this run",
        _RESTORE,
    ),
    Invariant(
        "phase-and-outbox",
        "COMMITTED runs have events in the outbox; EVENTS_PUBLISHED runs have none and a time; others have none",
        (
            Check(
                RUNS,
                f"{_then(_COMMITTED, f'{_EVENTS} = 0')} OR {_MARK_AND_TIME.format('r')}",
                f"r.phase || ' with ' || {_EVENTS} || ' events waiting, events_published_at ' || "
                f"{_PUBLISHED_AT.format('r')}",
            ),
            Check(
                WAITING,
                _run_of("o", f"c.phase <> 'COMMITTED' AND NOT ({_MARK_AND_TIME.format('c')})"),
                _run_of(
                    "o",
                    "c.phase || ' with ' || o.waiting || ' events waiting, events_published_at ' || "
                    f"{_PUBLISHED_AT.format('c')}",
                ),
            ),
        ),
        "events were deleted before they were published, or the run was marked as published too early",
        f"{_RESTORE}; remaining events are published by the relay",
    ),
    Invariant(
        "outbox-suffix",
        "the events of a run in the outbox are its last ones, up to sequence 3",
        (
            Statement("""
        SELECT o.tenant_id, o.run_id,
               'sequences ' || string_agg(o.sequence::text, ', ' ORDER BY o.sequence) AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o)
         GROUP BY o.tenant_id, o.run_id
        HAVING max(o.sequence) <> 3 OR min(o.sequence) < 1 OR count(*) <> 4 - min(o.sequence)
        """),
        ),
        "an event was published before an earlier one, or the last one is missing: the relay no longer finds the run",
        f"{_RESTORE}; send the run's message again: a duplicate publishes the remaining events",
    ),
    Invariant(
        "no-orphans",
        "every row of a domain table and of the outbox belongs to a run in the inbox",
        # A running trace belongs to the runner, whose message may still arrive. A rollback without a run belongs to a
        # run that was never committed.
        (
            Statement(
                """
        SELECT x.tenant_id, x.run_id, string_agg(DISTINCT x.of, ', ' ORDER BY x.of) AS detail
          FROM (
               SELECT i.tenant_id, i.run_id, 'incidents' AS of FROM governance.incidents i WHERE SLICE(i)
               UNION ALL
               SELECT p.tenant_id, p.run_id, 'prevention_records' FROM governance.prevention_records p WHERE SLICE(p)
               UNION ALL
               SELECT e.tenant_id, e.run_id, 'policy_evaluations' FROM governance.policy_evaluations e WHERE SLICE(e)
               UNION ALL
               SELECT t.tenant_id, t.run_id, 'traces' FROM governance.traces t WHERE SLICE(t)
               UNION ALL
               SELECT o.tenant_id, o.run_id, 'outbox_events' FROM governance.outbox_events o WHERE SLICE(o)
               ) x
          LEFT JOIN (SELECT r.tenant_id, r.run_id FROM governance.run_completions r WHERE ALSO(r)) r
            USING (tenant_id, run_id)
         WHERE r.run_id IS NULL
           -- Mentions r, so that it is evaluated after the join.
           AND CASE WHEN r.run_id IS NULL AND x.of = 'traces' THEN (
               SELECT t.status <> 'running' FROM governance.traces t
                WHERE t.tenant_id = x.tenant_id AND t.run_id = x.run_id) ELSE true END
         GROUP BY x.tenant_id, x.run_id
        """,
                of_orphans=True,
            ),
        ),
        "rows were written outside of a close-out, or the inbox row was deleted: a redelivery would fail",
        f"{_RESTORE}; delete the orphans, or restore the run's inbox row",
    ),
    Invariant(
        "finished",
        "an atomic run is always finished; a legacy run's phase and committed_at agree",
        (
            Check(
                RUNS,
                "r.mode = 'atomic' AND r.committed_at IS NULL"
                " OR (r.phase IN ('COMMITTED', 'EVENTS_PUBLISHED')) <> (r.committed_at IS NOT NULL)",
                "r.mode || ', ' || r.phase || ', committed_at '"
                " || CASE WHEN r.committed_at IS NULL THEN 'not set' ELSE 'set' END",
            ),
        ),
        "an atomic close-out is incomplete",
        f"{_RESTORE}; report it with the output of closeout runs show",
    ),
    Invariant(
        "outbox-stale",
        "no event is in the outbox longer than --older-than",
        (
            Statement("""
        SELECT o.tenant_id, o.run_id,
               count(*) || ' events since ' || to_char(min(o.created_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS"Z"')
               AS detail
          FROM governance.outbox_events o
         WHERE SLICE(o) AND o.created_at < now() - make_interval(secs => :older_than)
         GROUP BY o.tenant_id, o.run_id
        """),
        ),
        "no relay is running or reaches the broker, or no queue accepts the events (REQUIRE_EVENT_SUBSCRIBERS)",
        "start a worker, or run closeout reconcile --repair, which publishes the events now, with the same ids",
    ),
    Invariant(
        "legacy-stale",
        "no legacy run is unfinished after a failed write, or longer than --older-than",
        (
            Check(
                RUNS,
                "r.mode = 'legacy' AND r.committed_at IS NULL"
                " AND (r.received_at < now() - make_interval(secs => :older_than)"
                " OR EXISTS (SELECT FROM governance.rollbacks b WHERE b.tenant_id = r.tenant_id"
                " AND b.run_id = r.run_id))",
                "'stopped at ' || r.phase",
            ),
        ),
        "a legacy close-out is unfinished, and its message was not redelivered",
        "only the message can finish it: if it is in closeout.parked, replay it (closeout parked replay); otherwise "
        "the runner must publish it again, unchanged. The close-out resumes from its phase",
    ),
)
