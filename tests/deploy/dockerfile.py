"""Parses the part of the Dockerfile language that deploy/Dockerfile uses, and copies its build context."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_CONTINUED = re.compile(r"\\\n")
_KNOWN = frozenset({"RUN", "WORKDIR", "COPY", "ENV", "USER", "LABEL", "EXPOSE", "ENTRYPOINT", "CMD"})


class DockerfileError(Exception):
    """The file contains an unknown instruction; the message names it."""


class Instruction(NamedTuple):
    """One instruction, its continued lines joined."""

    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """Return the arguments, given as a JSON list or as shell words."""
        if self.rest.startswith("["):
            listed: list[str] = json.loads(self.rest)
            return listed
        return shlex.split(self.rest)


@dataclass(slots=True)
class Stage:
    """Everything from one FROM to the next."""

    image: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction:
        """Return the last instruction *name*, which overrides earlier ones."""
        return [found for found in self.instructions if found.name == name][-1]


def read_dockerfile(path: Path) -> list[Stage]:
    """Return the stages of the file at *path*; raise :class:`DockerfileError` for an unknown instruction."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in _CONTINUED.sub("", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        if name == "ARG" and not stages:
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name == "FROM":
            image, _, alias = rest.partition(" AS ")
            stages.append(Stage(re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], image), alias))
        elif name in _KNOWN and stages:
            stages[-1].instructions.append(Instruction(name, rest.strip()))
        else:
            raise DockerfileError(f"{path.name}: unknown instruction {name}: {line}")
    return stages


def make_context(checkout: Path, ignore: Path, context: Path) -> None:
    """Copy to *context* the files of *checkout* that *ignore*, which excludes ``*`` first, includes again."""
    lines = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
    if lines[0] != "*" or lines[-1] != "**/__pycache__":
        raise DockerfileError(f"{ignore.name}: expected * on the first line and **/__pycache__ on the last")
    for line in lines[1:-1]:
        found, copy = checkout / line.removeprefix("!"), context / line.removeprefix("!")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(found, copy)
