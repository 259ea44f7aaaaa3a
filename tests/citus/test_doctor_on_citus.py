"""closeout doctor on a Citus cluster."""

import json
from urllib.parse import urlsplit

from consumer.diagnosis import citus
from consumer.postgres.engine import create_engine
from tests.support.command_line import closeout
from tests.support.roles import WORKER, as_role, migrated_by_the_owner


async def checks(database_url: str, amqp_url: str) -> dict[str, dict[str, str]]:
    done = await closeout("doctor", "--json", DATABASE_URL=database_url, AMQP_URL=amqp_url)
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


async def test_a_sound_cluster_has_no_problem_for_the_workers_role(database_url, amqp_url):
    found = await checks(as_role(database_url, WORKER), amqp_url)
    assert found["distributed"]["state"] == "ok", found["distributed"]
    assert found["prepared"]["state"] == "ok", found["prepared"]
    assert "3 nodes" in found["prepared"]["found"]


async def test_tables_that_are_not_distributed_are_named(empty_database_url, amqp_url, postgres):
    await migrated_by_the_owner(postgres, urlsplit(empty_database_url).path.lstrip("/"))
    found = await checks(empty_database_url, amqp_url)
    assert found["distributed"]["state"] == "warning"
    assert "governance.run_completions" in found["distributed"]["found"]
    assert "closeout distribute" in found["distributed"]["remedy"]


async def test_a_transaction_left_prepared_is_counted_with_its_node(database_url, amqp_url, postgres, monkeypatch):
    monkeypatch.setattr(citus, "_RECOVERED_SECONDS", 0)
    node = postgres.workers[1]
    name = urlsplit(database_url).path.lstrip("/")
    # Not a name of Citus, which would recover it.
    node.psql("BEGIN; CREATE TABLE left_behind (); PREPARE TRANSACTION 'left behind'", name)
    engine = create_engine(database_url, pool_size=1)
    try:
        async with engine.connect() as conn:
            [_, prepared] = await citus.cluster_checks(conn)
            assert prepared.state == "warning"
            assert f"1 on 127.0.0.1:{node.port}" in prepared.found
    finally:
        node.psql("ROLLBACK PREPARED 'left behind'", name)
        await engine.dispose()


async def test_a_node_that_is_down_is_a_problem(database_url, amqp_url, postgres):
    postgres.workers[0].kill()
    try:
        found = await checks(database_url, amqp_url)
        assert found["prepared"]["state"] == "problem"
        assert str(postgres.workers[0].port) in found["prepared"]["found"]
    finally:
        postgres.workers[0].start()
