"""Distributes the tables over the nodes of a Citus cluster: each tenant's rows are on one node."""

from collections.abc import AsyncIterator, Iterator
from typing import Literal, NamedTuple

from sqlalchemy import Table, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.schema import SetColumnComment, SetTableComment

from domains.completions import run_completions
from domains.migrations.upgrade import current, newest
from domains.tables import metadata, policies

TENANT = "tenant_id"
# The other tables are colocated with the inbox: a run's rows, and so its transaction, are on one node.
FIRST = run_completions
# Small, read by every worker, and some rows apply to all tenants: each node has a copy.
EVERYWHERE = frozenset({policies})

Placement = Literal["distributed", "on every node"]


class Distributed(NamedTuple):
    """A table, where it is now, and whether this call moved it there."""

    table: str
    placement: Placement
    moved: bool


class NotDistributableError(Exception):
    """The tables cannot be distributed now; the text says what to do."""


def distributed_tables() -> Iterator[Table]:
    """Return the tables that are distributed by tenant, the inbox first."""
    yield FIRST
    yield from (table for table in metadata.sorted_tables if table not in {FIRST, *EVERYWHERE})


async def distribute(engine: AsyncEngine) -> AsyncIterator[Distributed]:
    """Distribute each table that is not yet, and yield it; safe to repeat, also after a failure.

    A table with rows is moved while it is written; writers wait only at the end of its move. Run it on the coordinator,
    as the tables' owner. Raises :class:`NotDistributableError`, and the database's errors.
    """
    async with engine.connect() as opened:
        # Citus moves a table in transactions of its own.
        conn = await opened.execution_options(isolation_level="AUTOCOMMIT")
        await conn.execute(text("SET statement_timeout = 0"))
        try:
            await _check(conn)
            now = await placements(conn)
            for table in distributed_tables():
                moved = now.get(str(table)) is None
                if moved:
                    await _move(conn, table)
                    await _comment(conn, table)
                yield Distributed(str(table), "distributed", moved)
            for table in EVERYWHERE:
                moved = now.get(str(table)) is None
                if moved:
                    await conn.execute(text(f"SELECT create_reference_table('{table}')"))
                    await _comment(conn, table)
                yield Distributed(str(table), "on every node", moved)
        finally:
            await conn.invalidate()  # its settings must not reach the pool


async def placements(conn: AsyncConnection) -> dict[str, Placement]:
    """Return where each table of a Citus cluster is, except those that are only on the coordinator."""
    found = await conn.execute(text(_PLACEMENTS))
    return {name: "distributed" if method == "h" else "on every node" for name, method in found}


_PLACEMENTS = """
    SELECT logicalrelid::regclass::text, partmethod::text FROM pg_dist_partition
     WHERE logicalrelid::regclass::text LIKE 'governance.%' AND (partmethod = 'h' OR repmodel = 't')
"""
_NODES = """
    SELECT count(*) FILTER (WHERE shouldhaveshards AND isactive) AS with_shards,
           (SELECT groupid FROM pg_dist_local_group) AS here
      FROM pg_dist_node WHERE noderole = 'primary'
"""


async def _check(conn: AsyncConnection) -> None:
    if (await conn.execute(text("SELECT to_regclass('pg_dist_node')"))).scalar_one() is None:
        raise NotDistributableError(
            "this database has no Citus: as a superuser, run CREATE EXTENSION citus in it on every node, then add the "
            "nodes on the coordinator (citus_set_coordinator_host, citus_add_node)"
        )
    found = (await conn.execute(text(_NODES))).one()
    if found.here != 0:
        raise NotDistributableError("this is not the coordinator: set DATABASE_URL to the coordinator")
    if not found.with_shards:
        raise NotDistributableError("the cluster has no node for shards: add one with citus_add_node")
    if (at := await conn.run_sync(current)) != newest():
        raise NotDistributableError(f"the schema is {f'at {at}' if at else 'empty'}: run closeout migrate first")


async def _move(conn: AsyncConnection, table: Table) -> None:
    beside = "none" if table is FIRST else str(FIRST)
    has_rows = (await conn.execute(text(f"SELECT EXISTS (SELECT FROM {table})"))).scalar_one()  # noqa: S608 - a constant
    function = "create_distributed_table_concurrently" if has_rows else "create_distributed_table"
    await conn.execute(text(f"SELECT {function}('{table}', '{TENANT}', colocate_with => '{beside}')"))


async def _comment(conn: AsyncConnection, table: Table) -> None:
    """Write the comments again: a table that Citus moves is a new one, without them."""
    if table.comment:
        await conn.execute(SetTableComment(table))
    for column in table.columns:
        if column.comment:
            await conn.execute(SetColumnComment(column))
