"""The rows that conditions of invariants are checked on.

A table is read in slices, by one of two placeholders: ``SLICE(alias)`` stands for a range of keys, ``ROWS(alias)`` for
a part of the table in its physical order, where a condition needs more than the keys. ``ALSO(alias)`` restricts a table
that is joined to the slice.
"""

# The rows of the inbox.
RUNS = "FROM governance.run_completions r WHERE ROWS(r)"
# The rows of the traces.
TRACES = "FROM governance.traces t WHERE ROWS(t)"
# The keys of the inbox, with those of the other tables. Only indexes are read.
KEYS = """
      FROM governance.run_completions r
      LEFT JOIN (SELECT i.tenant_id, i.run_id FROM governance.incidents i WHERE ALSO(i)) i USING (tenant_id, run_id)
      LEFT JOIN (SELECT p.tenant_id, p.run_id FROM governance.prevention_records p WHERE ALSO(p)) p
           USING (tenant_id, run_id)
      LEFT JOIN (SELECT e.tenant_id, e.run_id FROM governance.policy_evaluations e WHERE ALSO(e)) e
           USING (tenant_id, run_id)
      LEFT JOIN (SELECT t.tenant_id, t.run_id FROM governance.traces t WHERE ALSO(t)) t USING (tenant_id, run_id)
     WHERE SLICE(r)
"""
# The runs with events in the outbox.
WAITING = """
      FROM (SELECT o.tenant_id, o.run_id, count(*) AS waiting FROM governance.outbox_events o
             WHERE SLICE(o) GROUP BY o.tenant_id, o.run_id) o
     WHERE true
"""
# The sources, and the table in each that has the run's key.
SOURCES = {RUNS: "r", TRACES: "t", KEYS: "r", WAITING: "o"}
