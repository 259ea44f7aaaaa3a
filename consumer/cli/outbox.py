"""``closeout outbox``."""

from typing import Annotated

import typer

from consumer.cli.options import Json

app = typer.Typer(help="Committed events that RabbitMQ has not confirmed yet.", no_args_is_help=True)


@app.command()
def status(
    *,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="Age of a stale event: 90s, 5m, 2h, 1d.")] = "1m",
    as_json: Json = False,
) -> None:
    """Report unpublished events by tenant and type, and the age of the oldest. Exit 1 if any are stale.

    Example: closeout outbox status
    """
    from consumer.commands.outbox import print_status

    print_status(older_than=older_than, as_json=as_json)


@app.command()
def drain(
    *,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only events older than 0s, 90s, 5m, 2h, 1d.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish the events in the outbox now; each is removed after its confirm. Exit 1 if some were not published.

    Safe next to live workers: runs held by a relay are skipped, and a run's
    events keep their order and their ids. Events younger than 11 s may still be
    in flight, so drain waits for them. With --older-than 0s it publishes them at
    once, and subscribers may receive them twice, with the same id.

    Example: closeout outbox drain --older-than 5m
    """
    from consumer.commands.outbox import drain_outbox

    drain_outbox(older_than=older_than, as_json=as_json)
