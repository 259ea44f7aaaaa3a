"""The result of one domain for one run."""

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

Domain = Literal["incidents", "policies", "traces"]


@dataclass(frozen=True, slots=True)
class DomainResult:
    """One domain's part in one run's close-out.

    ``action`` is ``created`` (a row was inserted), ``completed`` (a running trace was finished), ``kept`` (an existing
    row is unchanged) or ``skipped`` (nothing to do). ``record_id`` is the row's id, null if skipped. ``shadow`` has one
    result per shadow policy that was true or failed: ``flag``, ``suppress_incident`` or ``error``.
    """

    domain: Domain
    action: Literal["created", "completed", "kept", "skipped"]
    record_id: UUID | None = None
    detail: str = ""
    shadow: tuple[str, ...] = ()
