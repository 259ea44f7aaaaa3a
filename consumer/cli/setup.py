"""Setting Closeout up, and checking it: schema, topology, doctor, and the published documents."""

from enum import StrEnum
from typing import Annotated

import typer

from consumer.cli.options import Json


class Document(StrEnum):
    """The documents that ``closeout schema`` prints."""

    RUN_COMPLETED = "run-completed"
    EVENTS = "events"
    ASYNCAPI = "asyncapi"


def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", metavar="", help="Change nothing; exit 1 if the schema differs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Migrate the database's schema to this version. Concurrent calls wait for each other.

    Example: closeout migrate --check
    """
    from consumer.commands.setup import migrate_schema

    migrate_schema(check=check, as_json=as_json)


def distribute(*, as_json: Json = False) -> None:
    """Distribute the tables over the nodes of a Citus cluster by tenant; safe to repeat.

    Needs DATABASE_URL of the coordinator, as the tables' owner, after closeout
    migrate. Workers may run: tables with rows are moved while they are written.

    Example: closeout distribute
    """
    from consumer.commands.setup import distribute_tables

    distribute_tables(as_json=as_json)


def topology(
    *,
    delete_unused: Annotated[
        bool,
        typer.Option(
            "--delete-unused",
            metavar="",
            help="Delete intake queues beyond INTAKE_QUEUES that have no messages and consumers; exit 1 if one has.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Declare exchanges, queues and bindings for INTAKE_QUEUES; safe to repeat.

    An exchange or queue that exists with other properties is reported, and not
    changed. After a change of INTAKE_QUEUES, runs go to the new queues at once;
    workers that consume the others empty them.

    Example: closeout topology
    """
    from consumer.commands.setup import declare_topology

    declare_topology(delete_unused=delete_unused, as_json=as_json)


def doctor(*, as_json: Json = False) -> None:
    """Check settings, database and broker from a worker's point of view. Exit 1 on a problem.

    Changes nothing, and neither sends nor consumes messages. It sends RabbitMQ
    requests that must be refused, to check permissions; they appear in the
    broker's log. Bindings are visible only through the management plugin.

    Example: closeout doctor
    """
    from consumer.commands.doctor import run_doctor

    run_doctor(as_json=as_json)


def schema(document: Annotated[Document, typer.Argument(help="The document to print.")]) -> None:
    """Print the JSON Schema (2020-12) of run-completed messages or of events, or the AsyncAPI 3 document of both.

    Example: closeout schema run-completed > run-completed.schema.json
    """
    from consumer.commands.setup import print_document

    print_document(document.value)
