"""``fault_of`` classifies each error that PostgreSQL and asyncpg raise."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.closeout.retries import retry_transient
from consumer.errors import Fault, fault_of, lies_in_data, sqlstate_of
from consumer.postgres.engine import create_engine
from consumer.postgres.readiness import probe
from tests.support.faults.postgresql_failures import (
    TRANSIENT,
    connection_cut_between_statements,
    connection_cut_in_a_statement,
    ended_in_a_statement,
    execute,
)
from tests.support.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(100)


@pytest.fixture
async def role_engine(scenario: Scenario) -> AsyncIterator[AsyncEngine]:
    """The worker's own role, through the proxy."""
    made = create_engine(scenario.environ["DATABASE_URL"], pool_size=3)
    yield made
    await made.dispose()


@pytest.mark.parametrize(("happens", "state"), TRANSIENT, ids=[m[0].__name__ for m in TRANSIENT])
async def test_database_errors_are_classified_as_transient(
    scenario: Scenario, role_engine: AsyncEngine, happens, state
):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test is about the type
        await happens(role_engine, scenario)
    assert fault_of(caught.value) is Fault.TRANSIENT, repr(caught.value)
    assert not lies_in_data(caught.value)
    if state is not None:
        assert sqlstate_of(caught.value) == state, repr(caught.value)


@pytest.mark.parametrize(
    ("statement", "state"),
    [
        ("INSERT INTO governance.rollbacks SELECT NULL", "23502"),
        ("INSERT INTO governance.t VALUES (1), (1)", "23505"),
        ("INSERT INTO governance.t VALUES (-1)", "23514"),
        ("SELECT 1 / 0", "22012"),
        ("SELECT 'x'::uuid", "22P02"),
        ("SELECT nothing()", "42883"),
        ("SELEC", "42601"),
        ("DO $$ BEGIN RAISE EXCEPTION 'refused by a trigger'; END $$", "P0001"),
    ],
)
async def test_errors_in_data_or_code_are_classified_as_unknown_and_isolated(
    scenario: Scenario, role_engine: AsyncEngine, statement: str, state: str
):
    await scenario.sql(
        "CREATE TABLE governance.t (x int PRIMARY KEY CHECK (x > 0)); GRANT ALL ON governance.t TO PUBLIC"
    )
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test is about the type
        async with role_engine.connect() as conn:
            await execute(conn, statement)
    assert (sqlstate_of(caught.value), fault_of(caught.value)) == (state, Fault.UNKNOWN)
    assert lies_in_data(caught.value)


async def test_an_engine_recovers_after_each_kind_of_lost_connection(scenario: Scenario, role_engine: AsyncEngine):
    for happens in (connection_cut_in_a_statement, connection_cut_between_statements, ended_in_a_statement):
        with pytest.raises(Exception):  # noqa: B017, PT011 - the other tests check which one
            await happens(role_engine, scenario)
        await retry_transient(lambda: probe(role_engine))
