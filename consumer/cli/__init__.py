"""The command line as it is typed: names, options and help. ``consumer.commands`` does the work.

Help must appear at once, so nothing here imports SQLAlchemy, aio-pika or the worker. Each command imports its module of
``consumer.commands`` when it runs (``tests/unit/test_imports.py`` lists these imports and keeps help fast).
"""

from typing import Annotated

import typer

from consumer.cli import operation, outbox, parked, policies, runs, setup
from consumer.version import installed_version

app = typer.Typer(
    help="Closes out agent runs: incident, policy evaluation and trace in one transaction, events after the commit.",
    epilog="Settings come from the environment (config/README.md). Exit 0: done, 1: found something wrong, "
    "2: used wrongly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer passes the option's value by position
    if wanted:
        typer.echo(installed_version())
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[  # noqa: FBT002 - typer reads an option's default here
        bool,
        typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of all commands."""


app.command("worker")(operation.worker)
app.command("publish")(operation.publish)
app.command("migrate")(setup.migrate)
app.command("distribute")(setup.distribute)
app.command("topology")(setup.topology)
app.command("doctor")(setup.doctor)
app.command("schema")(setup.schema)
app.add_typer(runs.app, name="runs")
app.add_typer(parked.app, name="parked")
app.add_typer(outbox.app, name="outbox")
app.add_typer(policies.app, name="policies")
app.command("reconcile")(operation.reconcile)
app.command("prune")(operation.prune)


def main() -> None:
    """Run the command line; the installed ``closeout`` starts here."""
    app()
