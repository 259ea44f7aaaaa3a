"""Statements, round trips and writes of a batch: counted, not timed, so that a regression fails on any machine."""

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.postgres.engine import create_engine
from domains.policies.book import PolicyBook
from tests.support import run_messages as runs

# In their order; each is a round trip. The mark is a separate transaction, without BEGIN and COMMIT.
STATEMENTS = [
    "BEGIN",
    "INSERT INTO governance.run_completions",
    "INSERT INTO governance.incidents",
    "INSERT INTO governance.policy_evaluations",
    "INSERT INTO governance.traces",
    "INSERT INTO governance.outbox_events",
    "COMMIT",
    "WITH gone AS",
]


async def spent(database_url, broker, batch, monkeypatch) -> tuple[list[str], int]:
    """Close out *batch* on a warm worker's connections; return the statements that were sent, and the AMQP writes."""
    engine = create_engine(database_url, pool_size=1, by_key=True)
    sent = _statements_of(engine)
    channel = ConfirmedChannel(broker)
    coordinator = RunCompletionTransaction(
        engine=engine, policies=PolicyBook(), publisher=EventPublisher(channel, metrics=Metrics())
    )
    await coordinator.execute(runs.run())  # reads the policies, prepares the statements

    queue = (await channel.opened()).write_queue
    writes = 0
    put = queue.put

    async def counted(frame):
        nonlocal writes
        writes += 1
        await put(frame)

    monkeypatch.setattr(queue, "put", counted)
    sent.clear()
    done = await coordinator.execute_many(batch)
    monkeypatch.undo()
    assert {result.phase for result in done} == {"EVENTS_PUBLISHED"}
    await engine.dispose()
    return sent, writes


def _statements_of(engine: AsyncEngine) -> list[str]:
    sent: list[str] = []

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection, _record) -> None:
        # The driver reports all statements except those that SQLAlchemy has prepared.
        connection.driver_connection.add_query_logger(lambda record: sent.append(" ".join(record.query.split())))

    @event.listens_for(engine.sync_engine, "after_cursor_execute")
    def on_execute(_connection, _cursor, statement, *_) -> None:
        sent.append(" ".join(statement.split()))

    return sent


def _starts(sent: list[str]) -> list[str]:
    return [next((start for start in STATEMENTS if query.startswith(start)), query) for query in sent]


async def test_a_batch_of_any_size_costs_eight_statements_and_one_write_of_events(database_url, broker, monkeypatch):
    for number in (1, 50):
        sent, writes = await spent(database_url, broker, [runs.run() for _ in range(number)], monkeypatch)
        assert _starts(sent) == STATEMENTS, number
        assert writes == 1, "150 events are written at once"


async def test_duplicates_cost_one_select_and_write_nothing_more(database_url, broker, monkeypatch):
    batch = [runs.run() for _ in range(50)]
    await spent(database_url, broker, batch, monkeypatch)
    sent, writes = await spent(database_url, broker, batch, monkeypatch)

    assert [query.split()[0].strip(";") for query in sent] == ["BEGIN", "INSERT", "SELECT", "COMMIT"]
    assert writes == 0
