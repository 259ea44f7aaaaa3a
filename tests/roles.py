"""The roles and users that are shipped, on the tests' servers: what ``deploy/`` says, and nothing added."""

from pathlib import Path
from urllib.parse import urlsplit

from servers import PostgresServer

from consumer.database import create_engine
from domains.migrate import migrate

DEPLOY = Path(__file__).parent.parent / "deploy"
OWNER, WORKER, OPERATOR, READER = (f"closeout_{name}" for name in ("owner", "worker", "operator", "reader"))


def make_roles(postgres: PostgresServer, database: str) -> None:
    """Make the roles and the schema, as an administrator does once."""
    postgres.psql((DEPLOY / "postgresql/roles.sql").read_text(), database)


def grant_rights(postgres: PostgresServer, database: str) -> None:
    """Grant what each role may do, as the tables' owner does after each migration."""
    postgres.psql((DEPLOY / "postgresql/rights.sql").read_text(), database, user=OWNER)


async def migrated_by_the_owner(postgres: PostgresServer, database: str) -> None:
    """Bring *database* to where a worker with its own role finds all it needs."""
    make_roles(postgres, database)
    engine = create_engine(postgres.url(database, user=OWNER), pool_size=1)
    await migrate(engine)
    await engine.dispose()
    grant_rights(postgres, database)


def as_role(url: str, role: str) -> str:
    """Return *url* for *role*; the tests' server asks nobody for a password."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}").geturl()
