-- Sets on the worker's role the settings that a worker sends at login, because PgBouncer drops them in transaction
-- mode. Run it once, as that role, on the server itself:
--   psql "$DATABASE_URL_OF_THE_WORKER_WITHOUT_PGBOUNCER" -f worker-role.sql
-- Open sessions keep their settings; RECONNECT on PgBouncer's console replaces them.

-- Limits for a statement, for a wait for a lock, and for the transaction of a stopped worker.
ALTER ROLE CURRENT_USER SET statement_timeout = '15s';
ALTER ROLE CURRENT_USER SET lock_timeout = '5s';
ALTER ROLE CURRENT_USER SET idle_in_transaction_session_timeout = '30s';
-- A close-out reads by key regardless of the statistics, and is planned once.
ALTER ROLE CURRENT_USER SET plan_cache_mode = 'force_generic_plan';
ALTER ROLE CURRENT_USER SET enable_seqscan = 'off';
ALTER ROLE CURRENT_USER SET enable_hashjoin = 'off';
ALTER ROLE CURRENT_USER SET enable_mergejoin = 'off';
ALTER ROLE CURRENT_USER SET jit = 'off';
