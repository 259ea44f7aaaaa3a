-- Creates Closeout's roles and its schema. Run it in Closeout's database, before the first `closeout migrate`,
-- as a superuser, or as the database's owner with CREATEROLE, as in a managed PostgreSQL: statements that need a
-- superuser are then skipped with a warning. Run rights.sql after every migrate.
--
--   psql -v ON_ERROR_STOP=1 --single-transaction -f roles.sql "$ADMIN_URL"
--
-- Safe to repeat, also over a schema that another role has migrated: its tables pass to closeout_owner. The roles are
-- created without passwords: with password authentication they cannot log in until they have one (\password
-- closeout_worker). It revokes from PUBLIC the defaults of a new database: temporary tables, large objects, and CREATE
-- in schema public. This affects the database's other users.

SET client_min_messages = warning; -- suppresses "already exists, skipping"

DO $$
DECLARE
    name text;
BEGIN
    -- owner: migrations. worker: `closeout worker`. operator: commands that change data. reader: read-only.
    FOREACH name IN ARRAY ARRAY['closeout_owner', 'closeout_worker', 'closeout_operator', 'closeout_reader'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS', name);
        END IF;
    END LOOP;
    EXECUTE format('REVOKE CREATE, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format(
        'GRANT CONNECT ON DATABASE %I TO closeout_owner, closeout_worker, closeout_operator, closeout_reader',
        current_database());
END
$$;

REVOKE CREATE ON SCHEMA public FROM PUBLIC;
-- Otherwise every role could fill the disk with these.
REVOKE EXECUTE ON FUNCTION lo_creat(integer), lo_create(oid), lo_from_bytea(oid, bytea) FROM PUBLIC;

DO $$
BEGIN
    -- Only a member of a role can make it the owner of a schema; a superuser counts as one, the role's creator does not.
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        GRANT closeout_owner TO CURRENT_USER;
    END IF;
END
$$;

DO $$
BEGIN
    -- A blocked migration reports the transaction that holds the lock; only these roles can see its age.
    GRANT pg_read_all_stats TO closeout_owner;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'closeout_owner does not have pg_read_all_stats, which % cannot grant: closeout migrate works, but '
        'does not report the age of a transaction that blocks it', current_user;
END
$$;

CREATE SCHEMA IF NOT EXISTS governance AUTHORIZATION closeout_owner;
ALTER SCHEMA governance OWNER TO closeout_owner;
-- Other sessions queue behind a waiting lock: fail instead, and run this again.
SET lock_timeout = '2s';
DO $$
DECLARE
    found regclass;
BEGIN
    FOR found IN
        SELECT c.oid FROM pg_class c
         WHERE c.relnamespace = 'governance'::regnamespace AND c.relkind IN ('r', 'p')
           AND c.relowner <> 'closeout_owner'::regrole
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO closeout_owner', found);
    END LOOP;
END
$$;
RESET lock_timeout;
