"""Each private attribute of a library that the product uses is listed here, so that an upgrade is checked first."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import aiormq.channel
import asyncpg
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("config", "consumer", "domains")

# The library's class, the attribute, and where the product uses or overrides it.
PRIVATE = {
    (aiormq.channel.Channel, "_confirm_delivery"): "consumer.amqp.channel",
    (aiormq.channel.Channel, "_get_frame"): "consumer.amqp.channel",
    (aiormq.channel.Channel, "_on_confirm_frame"): "consumer.amqp.channel",
    (aiormq.channel.Channel, "_on_deliver_frame"): "consumer.amqp.channel",
    (aiormq.channel.Channel, "_read_content"): "consumer.amqp.channel",
    (asyncpg.Connection, "_get_unique_id"): "consumer.postgres.engine",
}
# Documented, despite the underscore: os._exit, and the methods of named tuples.
DOCUMENTED = {"_asdict", "_exit", "_replace"}


def modules() -> list[str]:
    return sorted(
        found.name
        for package in PACKAGES
        for found in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        if "migrations" not in found.name
    )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used_by(module: str) -> set[tuple[str, str]]:
    """Return the private names that *module* uses and neither defines nor gets from another module of the product."""
    tree = ast.parse(Path(inspect.getfile(importlib.import_module(module))).read_text())
    return {
        (node.attr, module) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)
    } | {
        (alias.name, module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in PACKAGES
        for alias in node.names
        if is_private(alias.name)
    }


def defined() -> set[str]:
    """Return the private names that the product defines: functions, classes, class attributes, and names assigned."""
    names: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                        names.add(node.name)
                    case ast.Name(ctx=ast.Store()):
                        names.add(node.id)
                    case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                        names.add(node.attr)
                    case _:
                        pass
    return names


def overridden_by(module: str) -> set[tuple[str, str]]:
    """Return the private names of libraries' classes that classes of *module* override."""
    return {
        (name, module)
        for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass)
        if cls.__module__ == module
        for name in vars(cls)
        if is_private(name) and inspect.isfunction(vars(cls)[name])
        for base in cls.__mro__[1:]
        if base.__module__.split(".")[0] in {"aio_pika", "aiormq", "asyncpg", "sqlalchemy", "pamqp"}
        if name in vars(base)
    }


def test_each_private_attribute_of_a_library_is_listed_and_no_other():
    own = defined()
    used = {
        (name, module)
        for module in modules()
        for name, _ in used_by(module)
        if name not in own and name not in DOCUMENTED
    }
    overridden = {found for module in modules() for found in overridden_by(module)}
    assert used | overridden == {(name, module) for (_, name), module in PRIVATE.items()}


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=lambda value: getattr(value, "__name__", value))
def test_the_installed_library_has_each_private_attribute(owner, name):
    assert hasattr(owner, name)
