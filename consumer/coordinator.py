"""The transaction coordinator for tests and for programs that embed it."""

from functools import lru_cache

from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import load_settings
from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.connection import BrokerConnection
from consumer.closeout.transaction import RunCompletionTransaction
from consumer.metrics import Metrics
from consumer.outbox.publisher import EventPublisher
from consumer.postgres.engine import Url, create_engine
from domains.policies.book import PolicyBook


def create_transaction_coordinator(
    *,
    database_url: Url | None = None,
    engine: AsyncEngine | None = None,
    amqp_url: Url | None = None,
    metrics: Metrics | None = None,
) -> RunCompletionTransaction:
    """Return a new coordinator on *engine*, or on a new engine for *database_url*.

    With *amqp_url* it publishes events after the commit. Otherwise they stay in the outbox for a worker's relay.
    A URL given as a function is read for each new connection.
    Raises ``ValueError`` unless exactly one of *database_url* and *engine* is given.
    """
    if (database_url is None) == (engine is None):
        raise ValueError("give either database_url or engine")
    metrics = metrics or Metrics()
    publisher = None
    if amqp_url is not None:
        connection = BrokerConnection(amqp_url, name="closeout coordinator")
        publisher = EventPublisher(ConfirmedChannel(connection), metrics=metrics)
    return RunCompletionTransaction(
        engine=engine or create_engine(database_url or "", by_key=True),
        policies=PolicyBook(),
        publisher=publisher,
        metrics=metrics,
    )


@lru_cache(maxsize=1)
def get_transaction_coordinator() -> RunCompletionTransaction:
    """Return the coordinator that the environment configures, the same one at every call.

    Its connections belong to the event loop that uses it first. Raises ``SettingsError``.
    """
    settings = load_settings()
    return create_transaction_coordinator(database_url=settings.database_url_now, amqp_url=settings.amqp_url_now)
