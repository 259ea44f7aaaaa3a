-- What each role may do with Closeout's tables, exactly. Run it after every `closeout migrate`, as closeout_owner:
--
--   psql -v ON_ERROR_STOP=1 --single-transaction -f rights.sql "$OWNER_URL"
--
-- Safe to repeat beside live workers; in one transaction nobody is without a right for a moment. What else somebody
-- granted these roles on the tables is taken back. The worker's part is consumer/postgres/privileges.py, by which `closeout doctor`
-- looks; tests/integration/postgres/test_roles.py holds the two together and tries every right that is not here.

DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables WHERE schemaname = 'governance' LOOP
        EXECUTE format('REVOKE ALL ON %s FROM PUBLIC, closeout_worker, closeout_operator, closeout_reader', one.name);
    END LOOP;
    -- A REVOKE on the table leaves rights on columns; those that were granted.
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

-- The worker: claims, writes, marks. A row that is locked (FOR UPDATE) asks for UPDATE on some column of it, so
-- outbox_events has one that nothing but an alert reads.
GRANT INSERT, UPDATE (phase, committed_at, events_published_at) ON governance.run_completions TO closeout_worker;
GRANT INSERT ON
    governance.incidents, governance.prevention_records, governance.policy_evaluations, governance.rollbacks
    TO closeout_worker;
GRANT INSERT, UPDATE (status, started_at, completed_at, steps) ON governance.traces TO closeout_worker;
GRANT INSERT, UPDATE (created_at), DELETE ON governance.outbox_events TO closeout_worker;

-- The operator. `policies apply`:
GRANT INSERT, UPDATE (enabled, shadow) ON governance.policies TO closeout_operator;
-- `outbox drain`, `reconcile --repair`: what a worker's relay does.
GRANT UPDATE (phase, events_published_at) ON governance.run_completions TO closeout_operator;
GRANT UPDATE (created_at), DELETE ON governance.outbox_events TO closeout_operator;
-- `prune`. It locks incidents, so that none is opened again meanwhile; nothing decides by a title.
GRANT UPDATE (title) ON governance.incidents TO closeout_operator;
GRANT DELETE ON
    governance.run_completions, governance.incidents, governance.prevention_records, governance.policy_evaluations,
    governance.traces, governance.rollbacks
    TO closeout_operator;
