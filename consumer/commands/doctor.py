"""Checks whether a worker can work in this environment, and prints what to do if it cannot."""

import asyncio
from collections import Counter
from datetime import UTC, datetime

import typer
from rich.table import Column, Table
from rich.text import Text

from config.logs import configure_logs
from config.settings import Settings, examine_settings
from consumer.amqp.connection import BrokerConnection
from consumer.commands.output import out, print_json, print_line
from consumer.diagnosis.broker import examine_broker
from consumer.diagnosis.check import Check, State
from consumer.diagnosis.configuration import examine_configuration
from consumer.diagnosis.database import examine_database
from consumer.postgres.engine import SPARE_CONNECTIONS, create_engine
from consumer.wording import counted

_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "red"}


def run_doctor(*, as_json: bool) -> None:
    """Print every check; end with status 1 if one found a problem."""
    settings, faults = examine_settings()
    configure_logs("ERROR", settings.log_format)
    checks = examine_configuration(settings, faults) + asyncio.run(_servers(settings, set(faults)))
    counts = Counter(check.state for check in checks)
    if as_json:
        states = {f"{state}s" if state is not State.OK else "ok": counts[state] for state in State}
        print_json({**states, "checks": [check._asdict() for check in checks]})
    else:
        _print(checks, counts)
    if counts[State.PROBLEM]:
        raise typer.Exit(1)


async def _servers(settings: Settings, faults: set[str]) -> list[Check]:
    database = _database(settings) if "database_url" not in faults else _skipped()
    broker = _broker(settings) if "amqp_url" not in faults else _skipped()
    found = await asyncio.gather(database, broker)
    return [check for checks in found for check in checks]


async def _skipped() -> list[Check]:
    return []


async def _database(settings: Settings) -> list[Check]:
    engine = create_engine(settings.database_url.get_secret_value(), pool_size=1)
    needed = settings.max_concurrent_transactions + SPARE_CONNECTIONS
    try:
        return await examine_database(engine, connections_needed=needed, clock=lambda: datetime.now(UTC))
    finally:
        await engine.dispose()


async def _broker(settings: Settings) -> list[Check]:
    connection = BrokerConnection(settings.amqp_url.get_secret_value(), name="closeout doctor")
    try:
        return await examine_broker(connection, settings.intake_queues)
    finally:
        await connection.close()


def _print(checks: list[Check], counts: Counter[State]) -> None:
    if out.is_terminal:
        table = Table(Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False)
        for check in checks:
            text = check.found + (f"\nto do: {check.remedy}" if check.remedy else "")
            table.add_row(Text(check.state, style=_COLOURS[check.state]), check.name, Text(text))
        out.print(table)
    else:
        for check in checks:
            print_line(f"{check.state:<8} {check.name:<12} {check.found}")
            if check.remedy:
                print_line(f"{'':<22}to do: {check.remedy}")
    found = ", ".join(counted(counts[state], state) for state in (State.PROBLEM, State.WARNING))
    print_line(f"{found}, {counts[State.OK]} ok")
