-- What a worker asks of its sessions at login, given to its role instead: PgBouncer cannot pass it on in transaction
-- mode. Run it once, as that role, on the server itself:
--   psql "$DATABASE_URL_OF_THE_WORKER_WITHOUT_PGBOUNCER" -f worker-role.sql
-- Sessions that are open already keep what they have: RECONNECT on PgBouncer's console makes them anew.

-- A statement, a wait for somebody's lock, and a transaction whose worker has stopped, all end.
ALTER ROLE CURRENT_USER SET statement_timeout = '15s';
ALTER ROLE CURRENT_USER SET lock_timeout = '5s';
ALTER ROLE CURRENT_USER SET idle_in_transaction_session_timeout = '30s';
-- A close-out looks up by key, whatever the statistics say, and is planned once.
ALTER ROLE CURRENT_USER SET plan_cache_mode = 'force_generic_plan';
ALTER ROLE CURRENT_USER SET enable_seqscan = 'off';
ALTER ROLE CURRENT_USER SET enable_hashjoin = 'off';
ALTER ROLE CURRENT_USER SET enable_mergejoin = 'off';
ALTER ROLE CURRENT_USER SET jit = 'off';
