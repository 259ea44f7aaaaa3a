"""A Citus cluster in the place of the tests' PostgreSQL."""

import asyncio

from servers import PostgresServer
from servers.clusters.citus import CitusServer

from consumer.postgres.engine import create_engine
from domains.migrations.distribution import distribute
from tests.support.roles import OWNER, grant_rights, migrated_by_the_owner


class CitusForTests(CitusServer):
    """A cluster whose databases are migrated and distributed: a template cannot be copied."""

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create database *name*; migrate and distribute it if a *template* is named."""
        url = super().create_database(name)
        if template is not None:
            asyncio.run(self._migrate_and_distribute(name))
        return url

    async def _migrate_and_distribute(self, name: str) -> None:
        await migrated_by_the_owner(self, name)
        await self.distribute(name)

    async def distribute(self, name: str) -> None:
        """Distribute the tables of database *name*, and grant rights on them."""
        engine = create_engine(self.url(name, user=OWNER), command_timeout=None)
        async for _ in distribute(engine):
            pass
        await engine.dispose()
        grant_rights(self, name)


def grant_after_migration(postgres: PostgresServer, name: str) -> None:
    """Grant the roles' rights on the tables of database *name*; on a cluster, distribute them first."""
    if isinstance(postgres, CitusForTests):
        asyncio.run(postgres.distribute(name))
    else:
        grant_rights(postgres, name)


def passed_checks(postgres: PostgresServer, number: int) -> str:
    """Return the end of doctor's last line if *number* checks of one server pass; a cluster has two more."""
    return f"{number + 2 * isinstance(postgres, CitusForTests)} ok"
