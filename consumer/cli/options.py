"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

# For commands that take an id, which may begin with a hyphen.
ANY_ID = {"ignore_unknown_options": True}
# An empty metavar: a flag takes no value, and help would otherwise show its type.
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", metavar="", help="Report what would happen; change nothing.")]
Tenant = Annotated[str | None, typer.Option(metavar="TENANT", help="Only this tenant's runs.")]
Since = Annotated[str | None, typer.Option(metavar="TIME", help="Only runs received within the last 2h, 30d.")]
PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON; - is standard input.")]
Examples = Annotated[int, typer.Option(min=0, max=1_000, help="Maximum number of runs shown per policy and kind.")]
