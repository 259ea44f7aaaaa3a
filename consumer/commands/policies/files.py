"""Reads a policy file, or ends the command with every fault in it."""

import sys
from pathlib import Path

from consumer.commands.output import EXIT_USAGE, fail
from domains.policies.files import PolicyDraft, PolicyFileError, read_policies


def drafts_in(file: Path) -> list[PolicyDraft]:
    """Return the policies in *file*; end with status 1 if it is faulty, 2 if it cannot be read."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return read_policies(text, source=str(file))
    except (OSError, UnicodeDecodeError) as error:
        fail(f"FILE: cannot read {file}: {error}", status=EXIT_USAGE)
    except PolicyFileError as error:
        fail(str(error))
