"""Each generated table: Markdown from the settings class, the command line, the metrics, the tables and the phases.

A guide contains a table between ``<!-- generated: NAME -->`` and ``<!-- end generated -->``.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import typer
import typer.main

from config.settings import describe
from consumer.cli import app
from consumer.metrics import Metrics
from consumer.phases import diagram
from domains.tables import metadata

GUIDES = (
    "README.md",
    "config/README.md",
    "consumer/README.md",
    "consumer/commands/README.md",
    "consumer/contract/README.md",
    "deploy/prometheus/README.md",
)
_PLACE = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return the guide *text* with its generated tables as the code describes them now."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _settings() -> str:
    rows = (
        (f"`{name}`", default if default in {"required", "empty"} else f"`{default}`", meaning)
        for name, default, meaning in describe()
    )
    return _table(("variable", "default", "meaning"), rows)


def _metrics() -> str:
    rows = (
        (f"`{metric.name}{_labels(metric.labels)}`", metric.meaning, metric.rise, metric.to_do)
        for metric in Metrics().described
    )
    return _table(("metric", "meaning", "a rise means", "what to do"), rows)


def _labels(names: tuple[str, ...]) -> str:
    return f"{{{', '.join(names)}}}" if names else ""


def _phases() -> str:
    return f"```mermaid\n{diagram()}\n```"


def _tables() -> str:
    rows = []
    for table in metadata.sorted_tables:
        key = [column.name for column in table.primary_key]
        others = [column.name for column in table.columns if column.name not in key]
        rows.append((f"`{table.name}`", _code(key), _code(others)))
    return _table(("table", "primary key", "other columns"), sorted(rows))


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _commands() -> str:
    rows = ((f"`{_usage(name, command)}`", _summary(command)) for name, command in _leaves(typer.main.get_command(app)))
    return _table(("command", "what it does"), rows)


def _options() -> str:
    commands: dict[tuple[str, str], list[str]] = {}
    for name, command in _leaves(typer.main.get_command(app)):
        for parameter in command.params:
            if parameter.name not in {"help", "as_json"}:
                commands.setdefault((_parameter(parameter), parameter.help or ""), []).append(name)
    rows = ((f"`{parameter}`", _code(names), meaning) for (parameter, meaning), names in commands.items())
    return _table(("argument or option", "of", "meaning"), rows)


def _leaves(command: Any, *names: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - typer's commands are private
    if not hasattr(command, "list_commands"):
        yield " ".join(names), command
        return
    context = typer.Context(command)
    for name in command.list_commands(context):
        yield from _leaves(command.get_command(context, name), *names, name)


def _usage(name: str, command: Any) -> str:  # noqa: ANN401 - as above
    return " ".join(["closeout", name, *(_parameter(each) for each in command.params if _is_argument(each))])


def _summary(command: Any) -> str:  # noqa: ANN401 - as above
    """Return the first paragraph of the command's help."""
    return " ".join((command.help or "").partition("\n\n")[0].split())


def _is_argument(parameter: Any) -> bool:  # noqa: ANN401 - as above
    return bool(parameter.param_type_name == "argument")


def _parameter(parameter: Any) -> str:  # noqa: ANN401 - as above
    metavar = str(parameter.metavar or parameter.name).upper().strip("{}")
    if _is_argument(parameter):
        return metavar
    return parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {metavar}"


TABLES = {
    "commands": _commands,
    "metrics": _metrics,
    "options": _options,
    "phases": _phases,
    "settings": _settings,
    "tables": _tables,
}
