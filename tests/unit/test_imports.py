"""Imports decide how fast a command starts: help loads nothing that only the work needs."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.support.command_line import CLOSEOUT
from tests.unit.commands.test_command_line import ALL

ROOT = Path(__file__).parents[2]
HEAVY = {
    "sqlalchemy",
    "asyncpg",
    "aio_pika",
    "aiormq",
    "alembic",
    "uvicorn",
    "starlette",
    "jinja2",
    "opentelemetry",
    "structlog",
}
# The only modules with imports inside functions, and why each one has them.
LATE_IMPORTS = {
    "consumer/cli/operation.py": "the work of a command, when it runs",
    "consumer/cli/outbox.py": "the work of a command, when it runs",
    "consumer/cli/parked.py": "the work of a command, when it runs",
    "consumer/cli/policies.py": "the work of a command, when it runs",
    "consumer/cli/runs.py": "the work of a command, when it runs",
    "consumer/cli/setup.py": "the work of a command, when it runs",
    "consumer/tracing/loading.py": "OpenTelemetry, an optional dependency",
    "consumer/version.py": "importlib.metadata, which takes as long as the rest of help",
}
BARE = """
import typer
app = typer.Typer()
@app.command()
def first(number: int = 1) -> None: "The first command."
@app.command()
def second(number: int = 1) -> None: "The second command."
app()
"""


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def cpu_seconds(command: list[str]) -> float:
    """CPU of the process, not wall-clock time: other work on the machine does not count."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def test_a_module_loads_only_the_packages_that_it_uses():
    assert not loaded_by("import consumer") & {*HEAVY, "msgspec", "pydantic", "typer"}
    loaded = loaded_by("import consumer.errors")
    assert loaded >= {"sqlalchemy", "asyncpg", "aiormq"}
    assert not loaded & {
        "uvicorn",
        "starlette",
        "jinja2",
        "alembic",
        "structlog",
        "typer",
        "pydantic",
        "cel_expr_python",
    }


@pytest.mark.parametrize("name", ["", *sorted({name.split()[0] for name in ALL}), *sorted(ALL)])
def test_help_loads_no_package_that_only_the_work_needs(name):
    arguments = [*name.split(), "--help"]
    code = f"from typer.testing import CliRunner; from consumer.cli import app; CliRunner().invoke(app, {arguments!r})"
    assert not loaded_by(code) & HEAVY


@pytest.mark.parametrize(
    ("ours", "bare"), [(["--help"], ["--help"]), (["runs", "list", "--help"], ["first", "--help"])]
)
def test_help_takes_at_most_half_as_long_again_as_that_of_a_bare_application(tmp_path, ours, bare):
    program = tmp_path / "bare.py"
    program.write_text(BARE)
    pairs = [(cpu_seconds([CLOSEOUT, *ours]), cpu_seconds([sys.executable, str(program), *bare])) for _ in range(7)]
    assert median(one for one, _ in pairs) <= 1.5 * median(other for _, other in pairs)


def test_an_import_inside_a_function_is_an_exception_with_a_reason():
    found = set()
    for folder in ("consumer", "domains", "config"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            if any(
                isinstance(node, ast.Import | ast.ImportFrom) for function in functions for node in ast.walk(function)
            ):
                found.add(str(file.relative_to(ROOT)))
    assert found == set(LATE_IMPORTS)
