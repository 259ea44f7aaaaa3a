"""closeout distribute on a PostgreSQL without Citus; tests/citus has the others."""

from tests.support.command_line import closeout


async def test_distribute_needs_citus(database_url):
    done = await closeout("distribute", DATABASE_URL=database_url)
    assert done.returncode == 1
    assert done.stderr.startswith("this database has no Citus: as a superuser, run CREATE EXTENSION citus")
