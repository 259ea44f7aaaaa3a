"""The shipped roles and users on the tests' servers: exactly those of ``deploy/``."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from servers import PostgresServer, RabbitServer
from servers.postgres import SUPERUSER
from servers.rabbitmq import USER as ADMINISTRATOR

from consumer.postgres.engine import create_engine
from domains.migrations.upgrade import migrate

DEPLOY = Path(__file__).parents[2] / "deploy"
DEFINITIONS: dict[str, Any] = json.loads((DEPLOY / "rabbitmq/definitions.json").read_text())
OWNER, WORKER, OPERATOR, READER = (f"closeout_{name}" for name in ("owner", "worker", "operator", "reader"))
TOPOLOGY_USER, WORKER_USER, RUNNER_USER, OPERATOR_USER, SUBSCRIBER_USER = (
    f"closeout-{name}" for name in ("topology", "worker", "runner", "operator", "subscriber")
)
PASSWORD = "pw"


def make_roles(postgres: PostgresServer, database: str) -> None:
    """Create the roles and the schema, as an administrator does once."""
    postgres.psql((DEPLOY / "postgresql/roles.sql").read_text(), database)


def grant_rights(postgres: PostgresServer, database: str) -> None:
    """Grant the privileges of each role, as the tables' owner does after each migration."""
    postgres.psql((DEPLOY / "postgresql/rights.sql").read_text(), database, user=OWNER)


async def migrated_by_the_owner(postgres: PostgresServer, database: str) -> None:
    """Migrate *database* and grant the privileges that a worker with its own role needs."""
    make_roles(postgres, database)
    engine = create_engine(postgres.url(database, user=OWNER), pool_size=1)
    await migrate(engine)
    await engine.dispose()
    grant_rights(postgres, database)


def as_role(url: str, role: str) -> str:
    """Return a superuser's *url* for *role*, and any other unmodified; the tests' server requires no password."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}@{_host(url)}").geturl() if parts.username == SUPERUSER else url


def add_users(rabbit: RabbitServer) -> None:
    """Create every user of the definitions, with a password and without permissions."""
    for user in DEFINITIONS["users"]:
        rabbit.add_user(user["name"], PASSWORD, "^$", "^$", "^$")


def permit(rabbit: RabbitServer, vhost: str, user: str, *, name: str | None = None) -> None:
    """Give *user*, or one called *name*, in *vhost* the permissions of that user in the definitions."""
    own = next(entry for entry in DEFINITIONS["permissions"] if entry["user"] == user)
    topics = [
        (entry["exchange"], entry["write"], entry["read"])
        for entry in DEFINITIONS["topic_permissions"]
        if entry["user"] == user
    ]
    rabbit.permit(name or user, vhost, own["configure"], own["write"], own["read"], topics=topics)


def as_user(url: str, user: str) -> str:
    """Return an administrator's *url* for *user* of the definitions, and any other unmodified."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{PASSWORD}@{_host(url)}").geturl() if parts.username == ADMINISTRATOR else url


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]
