"""The W3C trace context of a message: headers ``traceparent`` and ``tracestate``. Contract section 1.

It is a remark of the sender's, never a reason to refuse a message: what does not keep to W3C's rules is left out, as
those rules say (https://www.w3.org/TR/trace-context/). It is no part of a message's digest.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

TRACE = TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

# Hexadecimal in lower case; neither id may be all zeros, and there is no version ff.
_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<ids>(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    r"(?P<more>-.*)?",
    re.DOTALL,
)
# What we write, as subscribers may check it.
TRACEPARENT_PATTERN = "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"
# The flags that are defined: sampled, and that the trace id is random. Of a version yet unknown no other is passed on.
_KNOWN_FLAGS = 0x03
# Everybody must pass on as much, and nobody need take more. It also keeps the header small beside the event.
TRACESTATE_CHARACTERS_MAX = 512
_TRACESTATE_MEMBERS_MAX = 32
_MEMBER = re.compile(r"[ \t]*(?:[a-z0-9][a-z0-9_\-*/@]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~][ \t]*)?")


class TraceContext(NamedTuple):
    """Where in a trace something belongs: the span that caused it, and what tracing vendors add to that."""

    traceparent: str
    tracestate: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The context as headers of a message, or attributes of an event."""
        return {TRACEPARENT: self.traceparent} | ({TRACESTATE: self.tracestate} if self.tracestate else {})


def context_in(headers: Mapping[str, Any] | None) -> TraceContext | None:
    """Return the trace context that *headers* name, ``None`` where they name none or break W3C's rules; never raises.

    AMQP has two types that clients write text as; both are read.
    """
    if not headers or TRACEPARENT not in headers:
        return None
    traceparent = valid_traceparent(_text(headers[TRACEPARENT]))
    if traceparent is None:
        return None
    return TraceContext(traceparent, _valid_tracestate(_text(headers.get(TRACESTATE))))


def valid_traceparent(text: str) -> str | None:
    """Return *text* as version 00 has it, ``None`` if it is no traceparent.

    A later version keeps the four fields of 00 in front, and is passed on as 00 with the flags that are known.
    """
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    if match["version"] == "00":
        return None if match["more"] else text
    return f"00-{match['ids']}-{int(match['flags'], 16) & _KNOWN_FLAGS:02x}"


def _valid_tracestate(text: str) -> str | None:
    if not 0 < len(text) <= TRACESTATE_CHARACTERS_MAX:
        return None
    members = text.split(",")
    return text if len(members) <= _TRACESTATE_MEMBERS_MAX and all(map(_MEMBER.fullmatch, members)) else None


def _text(value: object) -> str:
    """Return *value* as text, empty where it is none."""
    if isinstance(value, bytes | bytearray):
        return value.decode("ascii", "replace")
    return value if isinstance(value, str) else ""
