"""As whom each command is run: what the README's table under "Least privilege" says, and nothing besides.

A command gets no URL of a server for which its row has nobody, so that one which needed it would fail.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tests.acceptance.readme_blocks import README
from tests.support import roles

_SECTION = README.read_text().partition("\n## Least privilege\n")[2].partition("\n## ")[0]
# The bar between two cells; one within a cell has a backslash.
_BAR = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`([^`]*)`")
_ALL_OTHERS = "all other commands"


class Part(NamedTuple):
    """Who somebody is in the database, and at the broker; nobody there is ``None``."""

    role: str | None
    user: str | None

    def environ(self, *, database_url: str, amqp_url: str) -> dict[str, str]:
        """Return the variables for this part, out of an administrator's URLs."""
        urls = {
            "DATABASE_URL": self.role and roles.as_role(database_url, self.role),
            "AMQP_URL": self.user and roles.as_user(amqp_url, self.user),
        }
        return {name: url for name, url in urls.items() if url}


def _rows() -> list[tuple[Part, str]]:
    """Return each row's part and what it is for."""
    table = [_BAR.split(line) for line in _SECTION.splitlines() if line.startswith("|")]
    _head, _rule, *rows = table
    return [
        (Part(_named("closeout_", role), _named("closeout-", user)), purpose.strip())
        for _, role, user, purpose, *_ in rows
    ]


def _named(prefix: str, cell: str) -> str | None:
    name = _CODE.search(cell)
    return prefix + name[1] if name else None


def _commands(purpose: str) -> list[tuple[str, ...]]:
    """Return the commands in *purpose*; ``policies list\\|shadow`` are two."""
    commands = []
    for named in _CODE.findall(purpose):
        *group, last = named.split()
        commands += [(*group, one) for one in last.split("\\|")]
    return commands


ROWS = _rows()
NAMED = {command: part for part, purpose in ROWS for command in _commands(purpose)}
(OTHERS,) = (part for part, purpose in ROWS if purpose.startswith(_ALL_OTHERS))
WORKER, RUNNER = NAMED["worker",], NAMED["publish",]
# The only one who runs no command of ours.
SUBSCRIBER = Part(None, roles.SUBSCRIBER_USER)


def part_of(words: Sequence[str]) -> Part:
    """Return as whom ``closeout`` with *words* is run: as the row says that names the most of them."""
    named = [command for command in NAMED if set(command) <= set(words)]
    return NAMED[max(named, key=len)] if named else OTHERS
