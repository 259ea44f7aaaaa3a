"""Private PostgreSQL and RabbitMQ servers on free ports of 127.0.0.1, without a container engine.

Everything lies in a throw-away folder; nothing is installed on the machine and nothing is left behind.
The first use fetches RabbitMQ from the machine's Debian archive (10 s); later ones are up in 3 to 5 s.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from servers import run as foreground
from servers import up as background
from servers.binaries.kubectl import find_kubectl
from servers.binaries.pgbouncer import find_pgbouncer, version_of
from servers.binaries.postgres import find_postgres
from servers.binaries.prometheus import find_prometheus
from servers.binaries.rabbitmq import Version, find_rabbitmq
from servers.process import ServerError
from servers.service_pair import end_on_signals

NOT_RUNNING = 3  # as service managers say it
EXAMPLES = """\
examples:
  scripts/services run -- .venv/bin/pytest tests/integration
  scripts/services run --rabbitmq 4 -- sh -c 'echo $DATABASE_URL $AMQP_URL'
  eval "$(scripts/services up --management)"; echo "$RABBITMQ_MANAGEMENT_URL"
  scripts/services status
  scripts/services down

environment:
  PG_BIN           folder of other PostgreSQL programs than those of the development requirements
  CLOSEOUT_CACHE   where RabbitMQ, Prometheus, PgBouncer and kubectl are kept, by default below ~/.cache
  TMPDIR           where the servers' folders are made
"""


def main(arguments: Sequence[str]) -> int:
    """Carry out one command and return the exit status."""
    options = _parser().parse_args(arguments)
    end_on_signals()
    try:
        return _carry_out(options)
    except ServerError as error:
        print(f"services: {error}", file=sys.stderr)
        return 1


def _carry_out(options: argparse.Namespace) -> int:
    match options.command:
        case "run":
            return foreground.run(options.words, options.rabbitmq, management=options.management)
        case "up":
            state = background.up(options.folder, options.rabbitmq, management=options.management)
            _show(options.folder, state)
        case "supervise":
            return background.supervise(options.folder, options.rabbitmq, management=options.management)
        case "down":
            stopped = background.down(options.folder)
            print("stopped" if stopped else "nothing was running", file=sys.stderr)
        case "status":
            found = background.status(options.folder)
            if found is None:
                print(f"nothing runs in {options.folder}", file=sys.stderr)
                return NOT_RUNNING
            _show(options.folder, found)
        case _:
            for version in options.versions or get_args(Version):
                installation = find_rabbitmq(version)
                print(f"RabbitMQ {installation.version}: {installation.root}")
            print(f"PostgreSQL: {find_postgres()}")
            if not options.versions:
                prometheus = find_prometheus()
                print(f"Prometheus {prometheus.version}: {prometheus.folder}")
                pgbouncer = find_pgbouncer()
                print(f"PgBouncer {'.'.join(map(str, version_of(pgbouncer)))}: {pgbouncer}")
                kubectl = find_kubectl()
                print(f"kubectl with Kustomize {kubectl.kustomize_version}: {kubectl.path}")
    return 0


def _show(folder: Path, state: background.State) -> None:
    """Print what a shell can evaluate, and for the reader how to stop."""
    for name, value in state.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"# RabbitMQ {state.rabbitmq}; logs below {folder}")
    other = "" if folder == background.default_folder() else f" --folder {shlex.quote(str(folder))}"
    print(f"# stop with: scripts/services down{other}")


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/services", description=__doc__, epilog=EXAMPLES, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a command with both servers beside it",
        description="Run a command with DATABASE_URL and AMQP_URL in its environment; the exit status is its own.",
        usage="%(prog)s [-h] [--rabbitmq {3.10,4}] [--management] -- COMMAND...",
    )
    up = commands.add_parser("up", help="start both in the background and print their addresses")
    down = commands.add_parser("down", help="stop both and remove their folder")
    status = commands.add_parser("status", help=f"print the addresses; exit status {NOT_RUNNING} if nothing runs")
    install = commands.add_parser("install", help="only fetch what is missing")
    supervise = commands.add_parser("supervise")  # what `up` leaves in the background
    for command in (run, up, supervise):
        command.add_argument("--rabbitmq", choices=get_args(Version), default="3.10", help="which line (3.10)")
        command.add_argument("--management", action="store_true", help="with the management page")
    for command in (up, down, status, supervise):
        command.add_argument("--folder", type=_folder, default=background.default_folder(), help="(%(default)s)")
    install.add_argument("--rabbitmq", choices=get_args(Version), dest="versions", action="append", help="only this")
    run.add_argument("words", nargs="+", metavar="COMMAND", help="the command and its arguments")
    return parser


def _folder(text: str) -> Path:
    return Path(text).absolute()
