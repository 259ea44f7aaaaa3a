"""The status of a trace when its run completes. Pure."""

from types import MappingProxyType
from typing import Literal

TraceStatus = Literal["completed", "failed", "aborted"]

# A run halted by a rule and one stopped by a person both end their trace early.
STATUS_OF: MappingProxyType[str, TraceStatus] = MappingProxyType(
    {"succeeded": "completed", "failed": "failed", "halted": "aborted", "aborted": "aborted"}
)
