"""How a run's end completes its trace: pure rules, contract section 3."""

from types import MappingProxyType
from typing import Literal

TraceStatus = Literal["completed", "failed", "aborted"]

# A run that was halted by a rule and one that was stopped by a person both end their trace early.
STATUS_OF: MappingProxyType[str, TraceStatus] = MappingProxyType(
    {"succeeded": "completed", "failed": "failed", "halted": "aborted", "aborted": "aborted"}
)
