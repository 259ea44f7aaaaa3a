-- Distributes Closeout's tables over the nodes of a Citus cluster; each tenant's rows are on one node. Not tested on
-- Citus, and the worker's statements need changes first: deploy/README.md, "Citus".
--
--   psql -v ON_ERROR_STOP=1 --single-transaction -f citus.sql "$OWNER_URL"
--
-- Run it once, on the coordinator, as the tables' owner, after `closeout migrate` and before the first worker, with
-- CREATE EXTENSION citus done and the nodes added. Tables that hold rows are locked while these are moved:
-- create_distributed_table_concurrently, outside a transaction, moves them while they are written. A table that a later
-- migration adds must be distributed, too; tests/upgrades/test_distribution.py fails until it is here. schema_version
-- stays on the coordinator, where `closeout migrate` runs.

-- The other tables are colocated with the inbox: a run's rows, and so its transaction, are on one node.
SELECT create_distributed_table('governance.run_completions', 'tenant_id', colocate_with => 'none');
SELECT create_distributed_table('governance.incidents', 'tenant_id', colocate_with => 'governance.run_completions');
SELECT create_distributed_table(
    'governance.prevention_records', 'tenant_id', colocate_with => 'governance.run_completions');
SELECT create_distributed_table(
    'governance.policy_evaluations', 'tenant_id', colocate_with => 'governance.run_completions');
SELECT create_distributed_table('governance.traces', 'tenant_id', colocate_with => 'governance.run_completions');
SELECT create_distributed_table('governance.outbox_events', 'tenant_id', colocate_with => 'governance.run_completions');
SELECT create_distributed_table('governance.rollbacks', 'tenant_id', colocate_with => 'governance.run_completions');

-- Small, read by every worker, and some rows apply to all tenants.
SELECT create_reference_table('governance.policies');
