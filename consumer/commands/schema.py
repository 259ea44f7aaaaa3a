"""``closeout schema``: what goes in and what comes out, for those who program against it."""

from enum import StrEnum
from typing import Annotated

import typer

from consumer.commands.output import print_json


class Document(StrEnum):
    """What can be printed."""

    RUN_COMPLETED = "run-completed"
    EVENTS = "events"
    ASYNCAPI = "asyncapi"


def schema(document: Annotated[Document, typer.Argument(help="Which document to print.")]) -> None:
    """Print the JSON Schema (2020-12) of run-completed messages or of events, or the AsyncAPI 3 document of both.

    Example: closeout schema run-completed > run-completed.schema.json
    """
    from consumer.contract.asyncapi import asyncapi
    from consumer.contract.json_schema import events_schema, run_completed_schema

    made = {
        Document.RUN_COMPLETED: run_completed_schema,
        Document.EVENTS: events_schema,
        Document.ASYNCAPI: asyncapi,
    }
    print_json(made[document]())
