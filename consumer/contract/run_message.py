"""Decodes a run-completed message into a :class:`CompletedRun`, or refuses it with a reason.

Everything is bounded before it is allocated: first the body's size, then its encoding, then nesting and counts during
decoding. Unknown fields are ignored.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from consumer.contract.refusals import (
    MessageRefusedError,
    Numeral,
    describe_value,
    explain_malformed,
    explain_violation,
)
from domains.run import CompletedRun

SCHEMA_VERSION = 1
CONTENT_TYPE = "application/json"
# US dollars. A higher cost is a unit error, and PostgreSQL's numeric needs a bound.
MAX_COST_USD = Decimal(10) ** 12
# Digits after the point. A double printed in full has up to 20 for the lowest token prices.
MAX_COST_DECIMALS = 40

# asyncpg maps Python's first and last datetime to minus and plus infinity. One day of distance also covers offsets.
_EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
_LATEST = datetime(9999, 12, 31, tzinfo=UTC)

_decoder = msgspec.json.Decoder(CompletedRun)
# Fractions keep their text: a digest must neither depend on a double's precision nor overflow it.
_any_json = msgspec.json.Decoder(float_hook=Numeral)
_canonical = msgspec.json.Encoder(order="sorted", enc_hook=lambda numeral: msgspec.Raw(numeral.encode()))


class Decoded(NamedTuple):
    """A valid message: the run, and the digest that distinguishes a changed resend from a repeated one."""

    run: CompletedRun
    digest: bytes


def decode(
    body: bytes,
    *,
    max_bytes: int,
    content_type: str | None = None,
    content_encoding: str | None = None,
    user_id: str | None = None,
    trusted_publishers: frozenset[str] = frozenset(),
) -> Decoded:
    """Return the run in *body*; raise :class:`MessageRefusedError`, which names the field and what is expected.

    A missing content type counts as JSON. The digest is SHA-256 over the body's canonical JSON (sorted keys, no white
    space), unknown fields included: a runner may serialize a resend differently, but not change it.
    """
    _check_publisher(user_id, trusted_publishers)
    _check_envelope(body, max_bytes, content_type, content_encoding)
    try:
        document = _any_json.decode(body)
        # The strict decoder skips unknown fields; their bytes must still be UTF-8.
        body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageRefusedError("invalid_json", explain_malformed(body, error)) from None
    if not isinstance(document, dict):
        found = describe_value(document)
        raise MessageRefusedError("schema_violation", f"the body is {found}; expected one JSON object")
    _check_version(document)
    try:
        run = _decoder.decode(body)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise MessageRefusedError("schema_violation", explain_violation(document, str(error))) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise MessageRefusedError("invalid_json", explain_malformed(body, error)) from None
    _check_rules(run, may_hold_nul=b"\\u0000" in body)
    return Decoded(run, sha256(_canonical.encode(document)).digest())


def _check_publisher(user_id: str | None, trusted: frozenset[str]) -> None:
    if trusted and user_id not in trusted:
        found = "none" if user_id is None else describe_value(user_id)
        raise MessageRefusedError(
            "untrusted_publisher", f"property user_id: found {found}; expected one of TRUSTED_PUBLISHERS"
        )


def _check_envelope(body: bytes, max_bytes: int, content_type: str | None, content_encoding: str | None) -> None:
    if len(body) > max_bytes:
        raise MessageRefusedError(
            "too_large", f"the body has {len(body)} bytes; the limit is {max_bytes} (MESSAGE_MAX_BYTES)"
        )
    # Parameters such as charset are ignored: the body must be UTF-8.
    if content_type and content_type.split(";")[0].strip().lower() != CONTENT_TYPE:
        raise MessageRefusedError(
            "unsupported_content_type",
            f"property content_type: found {describe_value(content_type)}; expected {CONTENT_TYPE}",
        )
    if content_encoding and content_encoding.lower() not in {"utf-8", "utf8", "identity"}:
        raise MessageRefusedError(
            "unsupported_content_type",
            f"property content_encoding: found {describe_value(content_encoding)}; expected none, an uncompressed body",
        )


def _check_version(document: Mapping[str, Any]) -> None:
    version = document.get("schema_version")
    if "schema_version" not in document:
        raise MessageRefusedError("schema_violation", f"schema_version: missing; expected {SCHEMA_VERSION}")
    if isinstance(version, bool) or not isinstance(version, int):
        raise MessageRefusedError(
            "schema_violation",
            f"schema_version: found {describe_value(version)}; expected the integer {SCHEMA_VERSION}",
        )
    if version != SCHEMA_VERSION:
        raise MessageRefusedError(
            "unsupported_schema_version",
            f"schema_version: found {describe_value(version)}; expected {SCHEMA_VERSION}",
        )


def _check_rules(run: CompletedRun, *, may_hold_nul: bool) -> None:
    fault = _time_fault(run) or _cost_fault(run) or _index_fault(run)
    # JSON can express NUL only with this escape, so most messages need no search.
    if not fault and may_hold_nul:
        fault = _nul_fault(run)
    if fault:
        raise MessageRefusedError("schema_violation", fault)


def _time_fault(run: CompletedRun) -> str | None:
    for name in ("started_at", "completed_at"):
        if not _EARLIEST <= getattr(run, name) < _LATEST:
            found = getattr(run, name).isoformat()
            return f"{name}: found {found}; expected a time between the years 1 and 9999"
    if run.completed_at < run.started_at:
        return (
            f"completed_at: found {run.completed_at.isoformat()}; "
            f"expected a time not before started_at ({run.started_at.isoformat()})"
        )
    return None


def _cost_fault(run: CompletedRun) -> str | None:
    costs = [("usage.cost_usd", run.usage.cost_usd)]
    costs += [(f"steps[{position}].cost_usd", step.cost_usd) for position, step in enumerate(run.steps)]
    for path, cost in costs:
        if cost is None:
            continue
        # is_finite first: comparing NaN raises.
        if not cost.is_finite() or cost < 0 or cost >= MAX_COST_USD:
            return f"{path}: found {describe_value(cost)}; expected a decimal from 0 to below {MAX_COST_USD}"
        exponent = cost.as_tuple().exponent
        if isinstance(exponent, int) and -exponent > MAX_COST_DECIMALS:
            return f"{path}: found {describe_value(cost)}; expected at most {MAX_COST_DECIMALS} digits after the point"
    return None


def _index_fault(run: CompletedRun) -> str | None:
    seen: set[int] = set()
    for position, step in enumerate(run.steps):
        if step.index in seen:
            return f"steps[{position}].index: found {step.index} twice; expected an index that is unique in the run"
        seen.add(step.index)
    return None


def _nul_fault(run: CompletedRun) -> str | None:
    path = _find_nul(msgspec.to_builtins(run, builtin_types=(datetime, UUID, Decimal)), "")
    return f"{path}: found a NUL character; expected text that PostgreSQL can store" if path else None


def _find_nul(value: object, path: str) -> str | None:
    if isinstance(value, str):
        return path if "\x00" in value else None
    if isinstance(value, dict):
        for key, item in value.items():
            word = key if key.isidentifier() else describe_value(key)
            inner = f"{path}.{word}" if path else word
            if "\x00" in key:
                return f"{inner} (the key itself)"
            if found := _find_nul(item, inner):
                return found
    if isinstance(value, list | tuple):
        for position, item in enumerate(value):
            if found := _find_nul(item, f"{path}[{position}]"):
                return found
    return None
