"""A Citus cluster in the place of the tests' PostgreSQL."""

import asyncio

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
        engine = create_engine(self.url(name, user=OWNER), command_timeout=None)
        async for _ in distribute(engine):
            pass
        await engine.dispose()
        grant_rights(self, name)
