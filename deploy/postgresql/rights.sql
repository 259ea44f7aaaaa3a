-- The privileges of each role on Closeout's tables. Run it after every `closeout migrate`, as closeout_owner:
--
--   psql -v ON_ERROR_STOP=1 --single-transaction -f rights.sql "$OWNER_URL"
--
-- Safe to repeat while workers run: in one transaction no role loses a privilege that it needs. Other privileges of
-- these roles on the tables are revoked. `closeout doctor` checks the worker's part, in
-- consumer/postgres/privileges.py; tests/integration/postgres/test_roles.py compares the two, and tests every privilege
-- that is not granted.

DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables WHERE schemaname = 'governance' LOOP
        EXECUTE format('REVOKE ALL ON %s FROM PUBLIC, closeout_worker, closeout_operator, closeout_reader', one.name);
    END LOOP;
    -- A REVOKE on a table leaves the privileges on its columns.
    FOR one IN
        SELECT DISTINCT format('%I.%I', table_schema, table_name) AS name, column_name, privilege_type, grantee
          FROM information_schema.column_privileges
         WHERE table_schema = 'governance' AND grantee IN ('closeout_worker', 'closeout_operator', 'closeout_reader')
    LOOP
        EXECUTE format('REVOKE %s (%I) ON %s FROM %I', one.privilege_type, one.column_name, one.name, one.grantee);
    END LOOP;
END
$$;

GRANT USAGE ON SCHEMA governance TO closeout_worker, closeout_operator, closeout_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA governance TO closeout_worker, closeout_operator, closeout_reader;

-- The worker claims, writes and marks. SELECT FOR UPDATE needs UPDATE on some column: on outbox_events it is created_at,
-- which only an alert reads, and which workers before schema 0009 check.
GRANT INSERT, UPDATE (phase, committed_at, events_published_at) ON governance.run_completions TO closeout_worker;
GRANT INSERT ON
    governance.incidents, governance.prevention_records, governance.policy_evaluations, governance.rollbacks
    TO closeout_worker;
GRANT INSERT, UPDATE (status, started_at, completed_at, steps) ON governance.traces TO closeout_worker;
GRANT INSERT, UPDATE (created_at, set_aside_until, set_aside_reason), DELETE ON governance.outbox_events
    TO closeout_worker;

-- The operator. `policies apply`:
GRANT INSERT, UPDATE (enabled, shadow) ON governance.policies TO closeout_operator;
-- `outbox drain`, `reconcile --repair`: the privileges of a worker's relay.
GRANT UPDATE (phase, events_published_at) ON governance.run_completions TO closeout_operator;
GRANT UPDATE (created_at, set_aside_until, set_aside_reason), DELETE ON governance.outbox_events TO closeout_operator;
-- `prune` locks incidents, so that none is reopened meanwhile; no decision depends on a title.
GRANT UPDATE (title) ON governance.incidents TO closeout_operator;
GRANT DELETE ON
    governance.run_completions, governance.incidents, governance.prevention_records, governance.policy_evaluations,
    governance.traces, governance.rollbacks
    TO closeout_operator;
