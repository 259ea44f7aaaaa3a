"""Private PostgreSQL, PgBouncer, RabbitMQ and Prometheus servers for tests, demonstrations and benchmarks."""

from servers.pgbouncer import PgBouncerServer
from servers.postgres import PostgresServer
from servers.process import ServerError
from servers.prometheus import PrometheusServer
from servers.rabbitmq import RabbitError, RabbitServer
from servers.server import Server, start_all

__all__ = [
    "PgBouncerServer",
    "PostgresServer",
    "PrometheusServer",
    "RabbitError",
    "RabbitServer",
    "Server",
    "ServerError",
    "start_all",
]
