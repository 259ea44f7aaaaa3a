"""Checks of a Citus cluster: tables that are not distributed, and transactions that wait for the coordinator."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.diagnosis.check import Check, ok, problem, warning
from consumer.errors import one_line
from consumer.postgres.engine import DATABASE_ERRORS
from consumer.wording import counted
from domains.database.statements import on_citus
from domains.migrations.distribution import EVERYWHERE, distributed_tables, placements

# Seconds: Citus recovers prepared transactions every minute (citus.recover_2pc_interval); one that is older was missed.
_RECOVERED_SECONDS = 180
_PREPARED = text(
    """
    SELECT nodeport, nodename, success, result
      FROM run_command_on_all_nodes(format(
           'SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database() '
           'AND prepared < now() - make_interval(secs => %s)', CAST(:seconds AS int)))
      JOIN pg_dist_node USING (nodeid)
     ORDER BY nodeid
    """
)


async def cluster_checks(conn: AsyncConnection) -> list[Check]:
    """Return the checks of the cluster that *conn* belongs to; none on a server without Citus."""
    return [await _distributed(conn), await _prepared(conn)] if on_citus(conn) else []


async def _distributed(conn: AsyncConnection) -> Check:
    placed = await placements(conn)
    names = [str(table) for table in (*distributed_tables(), *EVERYWHERE)]
    if missing := [name for name in names if name not in placed]:
        message = f"only on the coordinator: {', '.join(missing)}"
        return warning("distributed", message, "run closeout distribute on the coordinator, as the tables' owner")
    return ok("distributed", f"{counted(len(names), 'table')} distributed by tenant or on every node")


async def _prepared(conn: AsyncConnection) -> Check:
    """Check for transactions that a crash left prepared: their locks make other transactions wait."""
    try:
        nodes = (await conn.execute(_PREPARED, {"seconds": _RECOVERED_SECONDS})).all()
    except DATABASE_ERRORS as error:
        return warning("prepared", f"cannot be counted: {one_line(error)}", "run closeout doctor as a superuser")
    if away := [f"{node.nodename}:{node.nodeport}: {str(node.result)[:200]}" for node in nodes if not node.success]:
        return problem("prepared", f"nodes do not respond: {'; '.join(away)}", "start them")
    left = {f"{node.nodename}:{node.nodeport}": int(node.result) for node in nodes if int(node.result)}
    if left:
        found = ", ".join(f"{number} on {node}" for node, number in left.items())
        message = f"transactions prepared more than {_RECOVERED_SECONDS} s ago: {found}; their locks are still held"
        remedy = "as a superuser, run SELECT recover_prepared_transactions() on the node that began them"
        return warning("prepared", message, remedy)
    return ok("prepared", f"no transaction is left prepared on {counted(len(nodes), 'node')}")
