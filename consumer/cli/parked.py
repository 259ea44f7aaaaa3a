"""``closeout parked``."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from consumer.cli.options import ANY_ID, DryRun, Json
from consumer.contract.refusals import ParkReason

app = typer.Typer(help="List, show, replay and discard parked messages.", no_args_is_help=True)

_Reason = Annotated[
    ParkReason | None,
    typer.Option(metavar="REASON", help=f"Only messages parked for: {', '.join(get_args(ParkReason))}."),
]
_Tenant = Annotated[
    str | None, typer.Option(metavar="TENANT", help="Only this tenant's messages, if the body can be read.")
]
_Run = Annotated[str | None, typer.Option(metavar="RUN", help="Only this run: RUN_ID or TENANT/RUN_ID.")]
_MessageId = Annotated[str | None, typer.Option(metavar="ID", help="Only messages with this message_id.")]
_Older = Annotated[str | None, typer.Option(metavar="TIME", help="Parked longer ago than 90s, 30m, 2h, 7d.")]
_Newer = Annotated[str | None, typer.Option(metavar="TIME", help="Parked within the last 90s, 30m, 2h, 7d.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Messages at most, oldest first.")]


@app.command("list")
def list_(
    *,
    reason: _Reason = None,
    tenant: _Tenant = None,
    run: _Run = None,
    message_id: _MessageId = None,
    older_than: _Older = None,
    newer_than: _Newer = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows, oldest first; all are counted.")] = 20,
    as_json: Json = False,
) -> None:
    """List parked messages, oldest first, and count them by reason. Changes nothing.

    Example: closeout parked list --reason conflicting_duplicate --newer-than 2h
    """
    from consumer.commands import parked

    filters = parked.filters_from(reason, tenant, run, message_id, older_than, newer_than)
    parked.print_messages(filters, limit=limit, as_json=as_json)


@app.command(context_settings=ANY_ID)
def show(
    selector: Annotated[
        str, typer.Argument(metavar="MESSAGE", help="A position in the list, a message_id, RUN_ID, or TENANT/RUN_ID.")
    ],
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="The run's id, if MESSAGE is its tenant.")
    ] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=20, help="Messages to show, if several match.")] = 5,
    as_json: Json = False,
) -> None:
    """Show a parked message completely: reason, error, properties, headers and body.

    Example: closeout parked show 3
    """
    from consumer.commands import parked

    parked.show_message(selector if run_id is None else f"{selector}/{run_id}", limit=limit, as_json=as_json)


@app.command()
def replay(
    *,
    reason: _Reason = None,
    tenant: _Tenant = None,
    run: _Run = None,
    message_id: _MessageId = None,
    older_than: _Older = None,
    newer_than: _Newer = None,
    limit: _Limit = None,
    exchange: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also replay to this exchange, for messages that came from it."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Publish parked messages to where they came from, once the cause is fixed. Their attempts restart at 0.

    A message is removed only after RabbitMQ confirmed its copy. A crash in
    between leaves both, and the run is closed out once. Replaying makes a message
    trusted: messages of untrusted publishers need --reason untrusted_publisher.

    Example: closeout parked replay --reason attempts_exhausted --dry-run
    """
    from consumer.commands import parked

    filters = parked.filters_from(reason, tenant, run, message_id, older_than, newer_than)
    parked.replay_messages(filters, limit=limit, exchanges=exchange or (), dry_run=dry_run, as_json=as_json)


@app.command()
def discard(
    *,
    reason: _Reason = None,
    tenant: _Tenant = None,
    run: _Run = None,
    message_id: _MessageId = None,
    older_than: _Older = None,
    newer_than: _Newer = None,
    limit: _Limit = None,
    everything: Annotated[bool, typer.Option("--all", metavar="", help="All messages, if no filter is given.")] = False,
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="Do not ask for confirmation.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="FILE", help="Write them to a new file of JSON Lines.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Delete parked messages permanently. Needs a filter or --all, and a confirmation on a terminal or --yes.

    --dump writes each message (headers, properties, body in base64) to disk
    before it is deleted.

    Example: closeout parked discard --reason invalid_json --dump discarded.jsonl
    """
    from consumer.commands import parked

    filters = parked.filters_from(reason, tenant, run, message_id, older_than, newer_than)
    parked.discard_messages(
        filters, limit=limit, everything=everything, yes=yes, dump_to=dump, dry_run=dry_run, as_json=as_json
    )
