"""What the command line and its groups are made of: typer's, whose help says of a flag no more than what it does."""

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

T = TypeVar("T", bound=Callable[..., Any])


def _untyped(parameters: list[Any]) -> list[Any]:
    """Take ``<bool>`` away from flags, which are given nothing."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 - typer's context is private
        return _untyped(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 - as above
        return _untyped(super().get_params(ctx))


class Application(typer.Typer):
    """A command line, or a group of its commands; each flag has one form and no type in its help."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - typer's own arguments
        super().__init__(cls=_Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[T], T]:  # noqa: ANN401 - as above
        """Register a command."""
        return super().command(name, cls=_Command, **settings)
