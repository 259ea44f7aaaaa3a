"""The role and the broker user of each command, from the table "Least privilege" of the deployment guide.

A command gets no URL of a server for which its row has no name, so that a command that needs it fails.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tests.support import roles
from tests.support.guides import section

_SECTION = section("deploy/README.md", "## Least privilege")
# The bar between two cells; a bar within a cell has a backslash.
_BAR = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`([^`]*)`")
_ALL_OTHERS = "all other commands"


class Identity(NamedTuple):
    """A database role and a broker user; ``None`` means no access."""

    role: str | None
    user: str | None

    def environ(self, *, database_url: str, amqp_url: str) -> dict[str, str]:
        """Return the variables of this identity, from an administrator's URLs."""
        urls = {
            "DATABASE_URL": self.role and roles.as_role(database_url, self.role),
            "AMQP_URL": self.user and roles.as_user(amqp_url, self.user),
        }
        return {name: url for name, url in urls.items() if url}


def _rows() -> list[tuple[Identity, str]]:
    """Return the identity of each row and its purpose."""
    table = [_BAR.split(line) for line in _SECTION.splitlines() if line.startswith("|")]
    _head, _rule, *rows = table
    return [
        (Identity(_named("closeout_", role), _named("closeout-", user)), purpose.strip())
        for _, role, user, purpose, *_ in rows
    ]


def _named(prefix: str, cell: str) -> str | None:
    name = _CODE.search(cell)
    return prefix + name[1] if name else None


def _commands(purpose: str) -> list[tuple[str, ...]]:
    """Return the commands in *purpose*; ``policies list\\|shadow`` names two."""
    commands = []
    for named in _CODE.findall(purpose):
        *group, last = named.split()
        commands += [(*group, one) for one in last.split("\\|")]
    return commands


ROWS = _rows()
NAMED = {command: identity for identity, purpose in ROWS for command in _commands(purpose)}
(OTHERS,) = (identity for identity, purpose in ROWS if purpose.startswith(_ALL_OTHERS))
WORKER, RUNNER = NAMED["worker",], NAMED["publish",]
# The only one that runs no closeout command.
SUBSCRIBER = Identity(None, roles.SUBSCRIBER_USER)


def identity_for(words: Sequence[str]) -> Identity:
    """Return the identity that runs ``closeout`` with *words*: that of the row that names most of them."""
    named = [command for command in NAMED if set(command) <= set(words)]
    return NAMED[max(named, key=len)] if named else OTHERS
