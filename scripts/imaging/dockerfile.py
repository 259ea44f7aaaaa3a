"""A Dockerfile as stages of instructions: as much of the language as deploy/Dockerfile uses, and not more."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_CONTINUED = re.compile(r"\\\n")
_KNOWN = frozenset({"RUN", "WORKDIR", "COPY", "ENV", "USER", "LABEL", "EXPOSE", "ENTRYPOINT", "CMD"})


class DockerfileError(Exception):
    """The file has an instruction that is not understood here; the text names it."""


class Instruction(NamedTuple):
    """One instruction, its continued lines joined."""

    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """Return the arguments: a JSON list, or words as a shell parts them."""
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
        """Return the last instruction *name*, which is the one that counts."""
        return [found for found in self.instructions if found.name == name][-1]


def read_dockerfile(path: Path) -> list[Stage]:
    """Return the stages of the file at *path*; raise :class:`DockerfileError` for what is not known here."""
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
            raise DockerfileError(f"{path.name}: {name} is not understood here: {line}")
    return stages
