"""The command line, contract section 7: thin, one function a command."""

from typing import Annotated

import typer

from consumer.commands import doctor, outbox, parked, prune, publish, reconcile, runs, schema
from consumer.commands.output import fail, print_json
from consumer.commands.policies import app as policies
from consumer.commands.session import end_after, in_words, settings_for, with_database
from consumer.commands.typer_app import Application
from consumer.errors import one_line
from consumer.version import installed_version

# Objects made and kept between two looks of the cyclic garbage collector at the youngest: those of about ten batches.
_COLLECT_AFTER = 20_000

app = Application(
    help="Closes out agent runs: incident, policy evaluation and trace in one transaction, events after the commit.",
    epilog="Settings come from the environment; see the README's table. Exit 0: done, 1: found something wrong, "
    "2: used wrongly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback
    if wanted:
        typer.echo(installed_version())
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[  # noqa: FBT002 - typer's way to write an option
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Say what all commands have in common."""


@app.command()
def worker() -> None:
    """Consume run-completed messages until SIGTERM or SIGINT, then drain and exit 0.

    Needs DATABASE_URL and AMQP_URL, a migrated schema (closeout migrate) and a
    declared topology (closeout topology); while one of them is missing it waits,
    and /readyz says for what. The console is at / of HTTP_HOST and HTTP_PORT.

    Example: TRANSACTION_COORDINATOR_ENABLED=true closeout worker
    """
    # Imported here: the other commands start faster without the server.
    import gc

    import uvloop

    from config.otel import span_exporters
    from consumer.assembly import build_service
    from consumer.tracing.loading import load_spans

    settings = settings_for()

    async def work() -> None:
        service = build_service(settings, spans=load_spans(span_exporters(), amqp_url=settings.amqp_url_now()))
        # What is there now stays; and a batch is thousands of objects without a cycle among them, which Python's
        # default of 700 has looked through three times a batch of 100: 8% of a transaction's CPU.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        await service.run(on_signal=lambda: end_after(settings.shutdown_grace_seconds))

    try:
        uvloop.run(work())
    except* OSError as group:
        fail(one_line(group.exceptions[0]))


@app.command()
def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if schema and tables disagree.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bring the database's schema to this version. Several may start it at once; one works, the others wait.

    Example: closeout migrate --check
    """
    from domains.migrations.upgrade import MigrationBlockedError, PooledConnectionError, differences, migrate

    if check:
        found = with_database(differences)
        if as_json:
            print_json({"differences": found})
        if found:
            fail("the schema is not what this version expects:\n" + "\n".join(found))
        typer.echo("schema and tables agree", err=as_json)
        return
    try:
        # An index built beside live workers takes as long as it takes.
        before, after = with_database(migrate, command_timeout=None)
    except (MigrationBlockedError, PooledConnectionError) as error:
        fail(str(error))
    if as_json:
        print_json({"before": before, "after": after})
    else:
        typer.echo(f"schema is at {after}" if before == after else f"schema migrated: {before or 'empty'} -> {after}")


@app.command()
def topology(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Declare exchanges, queues and bindings; safe to repeat.

    What exists with other properties is named, not changed.

    Example: closeout topology
    """
    from consumer.amqp.connection import BrokerConnection
    from consumer.amqp.topology import TopologyMismatchError, declare

    settings = settings_for(need_database=False)

    async def run() -> None:
        connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout topology")
        try:
            stands = await declare(connection)
        except TopologyMismatchError as error:
            fail(str(error))
        finally:
            await connection.close()
        if as_json:
            print_json({"declared": stands})
        else:
            typer.echo("\n".join(stands))

    in_words(run())


app.command("publish")(publish.publish)
app.add_typer(runs.app, name="runs")
app.add_typer(parked.app, name="parked")
app.add_typer(outbox.app, name="outbox")
app.add_typer(policies.app, name="policies")
app.command("reconcile")(reconcile.reconcile)
app.command("prune")(prune.prune)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)


def main() -> None:
    """Run the command line; the installed ``closeout`` starts here."""
    app()
