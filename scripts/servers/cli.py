"""Private PostgreSQL and RabbitMQ servers on free ports of 127.0.0.1, without a container engine.

All files are in a temporary folder, which is removed at the end; nothing is installed on the machine.
The first start fetches RabbitMQ from the Debian archive of the machine (10 s); later starts take 3 to 5 s.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from servers.binaries.debian_program import KUBECTL, PGBOUNCER, PROMETHEUS
from servers.binaries.postgres import find_postgres
from servers.binaries.rabbitmq import DEFAULT_VERSION, Version, find_rabbitmq
from servers.process import ServerError
from servers.run import run
from servers.service_pair import end_on_signals
from servers.up import State, default_folder, down, status, supervise, up

NOT_RUNNING = 3  # as in systemctl
EXAMPLES = """\
examples:
  scripts/services run -- .venv/bin/pytest tests/integration
  scripts/services run --rabbitmq 3.10 -- sh -c 'echo $DATABASE_URL $AMQP_URL'
  eval "$(scripts/services up --management)"; echo "$RABBITMQ_MANAGEMENT_URL"
  scripts/services status
  scripts/services down

environment:
  PG_BIN           folder of PostgreSQL programs to use instead of those of the development requirements
  CLOSEOUT_CACHE   folder for RabbitMQ, Prometheus, PgBouncer and kubectl (default: ~/.cache/closeout)
  TMPDIR           folder in which the folders of the servers are created
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    end_on_signals()
    try:
        return _run_command(options)
    except ServerError as error:
        print(f"services: {error}", file=sys.stderr)
        return 1


def _run_command(options: argparse.Namespace) -> int:
    match options.command:
        case "run":
            return run(options.words, options.rabbitmq, management=options.management)
        case "up":
            _print_addresses(options.folder, up(options.folder, options.rabbitmq, management=options.management))
        case "supervise":
            return supervise(options.folder, options.rabbitmq, management=options.management)
        case "down":
            stopped = down(options.folder)
            print("stopped" if stopped else "no servers were running", file=sys.stderr)
        case "status":
            found = status(options.folder)
            if found is None:
                print(f"no servers are running in {options.folder}", file=sys.stderr)
                return NOT_RUNNING
            _print_addresses(options.folder, found)
        case _:
            for version in options.versions or get_args(Version):
                installation = find_rabbitmq(version)
                print(f"RabbitMQ {installation.version}: {installation.root}")
            print(f"PostgreSQL: {find_postgres()}")
            if not options.versions:
                for program in (PROMETHEUS, PGBOUNCER, KUBECTL):
                    root = program.find()
                    print(f"{program.name} {program.version_of(root)}: {root}")
    return 0


def _print_addresses(folder: Path, state: State) -> None:
    """Print the addresses as shell commands, and how to stop the servers."""
    for name, value in state.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"# RabbitMQ {state.rabbitmq}; logs below {folder}")
    option = "" if folder == default_folder() else f" --folder {shlex.quote(str(folder))}"
    print(f"# stop with: scripts/services down{option}")


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/services", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for_run = commands.add_parser(
        "run",
        help="run a command while both servers are up",
        description="Run a command with DATABASE_URL and AMQP_URL in its environment, and exit with its status.",
        usage="%(prog)s [-h] [--rabbitmq {4,3.10}] [--management] -- COMMAND...",
    )
    for_up = commands.add_parser("up", help="start both in the background and print their addresses")
    for_down = commands.add_parser("down", help="stop both and remove their folder")
    for_status = commands.add_parser("status", help=f"print the addresses; exit status {NOT_RUNNING} if not running")
    for_install = commands.add_parser("install", help="only fetch missing programs")
    for_supervise = commands.add_parser("supervise")  # the background process of `up`
    versions = get_args(Version)
    for command in (for_run, for_up, for_supervise):
        command.add_argument("--rabbitmq", choices=versions, default=DEFAULT_VERSION, help="version (%(default)s)")
        command.add_argument("--management", action="store_true", help="enable the management UI")
    for command in (for_up, for_down, for_status, for_supervise):
        command.add_argument("--folder", type=_folder, default=default_folder(), help="(%(default)s)")
    for_install.add_argument("--rabbitmq", choices=versions, dest="versions", action="append", help="only this version")
    for_run.add_argument("words", nargs="+", metavar="COMMAND", help="the command and its arguments")
    return parser


def _folder(text: str) -> Path:
    return Path(text).absolute()
