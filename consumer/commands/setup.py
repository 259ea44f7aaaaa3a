"""Migrates the schema, declares the topology, prints the published documents."""

import typer
from sqlalchemy.ext.asyncio import AsyncEngine

from consumer.amqp.connection import BrokerConnection
from consumer.amqp.intake_topology import Moved, move
from consumer.amqp.topology import TopologyMismatchError
from consumer.commands.output import fail, print_json
from consumer.commands.session import run_to_end, settings_for, with_database
from consumer.contract.asyncapi import asyncapi
from consumer.contract.json_schema import events_schema, run_completed_schema
from domains.migrations.distribution import Distributed, NotDistributableError, distribute
from domains.migrations.upgrade import MigrationBlockedError, PooledConnectionError, differences, migrate


def migrate_schema(*, check: bool, as_json: bool) -> None:
    """Migrate, or with *check* compare; end with status 1 if the schema differs or cannot be migrated."""
    if check:
        found = with_database(differences)
        if as_json:
            print_json({"differences": found})
        if found:
            fail("the schema differs from this version's:\n" + "\n".join(found))
        typer.echo("schema and tables agree", err=as_json)
        return
    try:
        # No timeout: building an index next to live workers may take long.
        before, after = with_database(migrate, command_timeout=None)
    except (MigrationBlockedError, PooledConnectionError) as error:
        fail(str(error))
    if as_json:
        print_json({"before": before, "after": after})
    else:
        typer.echo(f"schema is at {after}" if before == after else f"schema migrated: {before or 'empty'} -> {after}")


def distribute_tables(*, as_json: bool) -> None:
    """Distribute the tables, a line for each; end with status 1 if that is not possible here."""
    tables: list[Distributed] = []

    async def work(engine: AsyncEngine) -> None:
        async for table in distribute(engine):
            tables.append(table)
            if not as_json:
                typer.echo(f"{table.table}: {'now' if table.moved else 'already'} {table.placement}")

    try:
        with_database(work, command_timeout=None)  # a table with rows may take long
    except NotDistributableError as error:
        fail(str(error))
    if as_json:
        print_json({"tables": [table._asdict() for table in tables]})


def declare_topology(*, delete_unused: bool, as_json: bool) -> None:
    """Declare exchanges, queues and bindings for ``INTAKE_QUEUES``.

    Ends with status 1 if one exists with other properties, or if unused queues are to be deleted and are not empty.
    """
    settings = settings_for(need_database=False)

    async def run() -> None:
        connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout topology")
        try:
            moved = await move(connection, settings.intake_queues, delete_unused=delete_unused)
        except TopologyMismatchError as error:
            fail(str(error))
        finally:
            await connection.close()
        _print_moved(moved, as_json=as_json)
        if delete_unused and moved.unused:
            fail("not deleted: a queue must have neither messages nor consumers")

    run_to_end(run())


def _print_moved(moved: Moved, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "declared": moved.declared,
                "removed": moved.removed,
                "unused": [queue._asdict() for queue in moved.unused],
            }
        )
        return
    lines = [*moved.declared, *(f"removed: {what}" for what in moved.removed)]
    lines += [f"not used any more: queue {queue}" for queue in moved.unused]
    typer.echo("\n".join(lines))


def print_document(name: str) -> None:
    """Print one of the documents that runners and subscribers program against."""
    documents = {"run-completed": run_completed_schema, "events": events_schema, "asyncapi": asyncapi}
    print_json(documents[name]())
