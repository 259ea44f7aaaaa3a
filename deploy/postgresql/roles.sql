-- Closeout's roles, and the schema that is theirs. Run it in Closeout's database, before the first `closeout migrate`,
-- as a superuser, or as an owner of the database who may create roles, as a managed PostgreSQL has one: what only a
-- superuser can do is then left out with a warning. Then rights.sql after every migrate.
--
--   psql -v ON_ERROR_STOP=1 --single-transaction -f roles.sql "$ADMIN_URL"
--
-- Safe to repeat, also over a schema that another role has migrated: its tables pass to closeout_owner. The roles are
-- made without passwords, so that a server that asks for one lets nobody in until there is one (\password
-- closeout_worker). It takes from PUBLIC what a new database gives to everybody: temporary tables, large objects, and
-- CREATE in schema public. Keep that in mind where the database has other users.

SET client_min_messages = warning; -- that something is there already is no news

DO $$
DECLARE
    name text;
BEGIN
    -- owner: migrates. worker: `closeout worker`. operator: people's commands. reader: looks, and changes nothing.
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
-- Anybody may otherwise fill the disk through these.
REVOKE EXECUTE ON FUNCTION lo_creat(integer), lo_create(oid), lo_from_bytea(oid, bytea) FROM PUBLIC;

DO $$
BEGIN
    -- A schema is given to a role only by who may be that role, as a superuser may and who made it not yet.
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        GRANT closeout_owner TO CURRENT_USER;
    END IF;
END
$$;

DO $$
BEGIN
    -- A migration that cannot have a table names the transaction that holds it; its age is told to these only.
    GRANT pg_read_all_stats TO closeout_owner;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'closeout_owner is without pg_read_all_stats, which % cannot give: closeout migrate works, and does '
        'not say how long a transaction has been in its way', current_user;
END
$$;

CREATE SCHEMA IF NOT EXISTS governance AUTHORIZATION closeout_owner;
ALTER SCHEMA governance OWNER TO closeout_owner;
-- Whoever waits behind these locks waits as long: rather fail, and be run again.
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
