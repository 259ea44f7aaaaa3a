"""Decodes a run-completed message into a :class:`CompletedRun`, or refuses it with a reason.

A run is accepted whenever its identity and its outcome are clear. A message in the strict form, which the JSON Schema
describes, is decoded directly; any other is read by :mod:`consumer.contract.normalize`. Everything is bounded before it
is allocated. Unknown fields are ignored.
"""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from consumer.contract.adjustments import Adjustment
from consumer.contract.envelope import open_envelope
from consumer.contract.metadata import is_plain
from consumer.contract.normalize import normalize, same_uuid
from consumer.contract.refusals import MessageRefusedError, Numeral, describe_value, explain_malformed
from consumer.contract.scalars import EARLIEST, LATEST, MAX_COST_DECIMALS, MAX_COST_USD
from domains.run import CompletedRun, Money

SCHEMA_VERSION = 1
# Maximum nesting that is read. Deeper values become null: no field is that deep, and the decoders recurse.
_LEVELS_MAX = 100
# Digits of an integer that Python converts without a limit.
_DIGITS_MAX = 4_300

_strict = msgspec.json.Decoder(CompletedRun)
# Fractions keep their text: a digest must neither depend on a double's precision nor overflow it.
_any_json = msgspec.json.Decoder(float_hook=Numeral)
_canonical = msgspec.json.Encoder(order="sorted", enc_hook=lambda numeral: msgspec.Raw(numeral.encode()))
# A string, or brackets that follow each other.
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]+|[\]}]+', re.DOTALL)


class Decoded(NamedTuple):
    """A valid message: the run, what was adjusted, and the digest of the message.

    Equal digests mean an equal message; different ones may still mean the same run. ``event_id`` is the id of the
    CloudEvent that the run came in, if any.
    """

    run: CompletedRun
    digest: bytes
    event_id: str | None = None
    adjustments: tuple[Adjustment, ...] = ()


def decode(
    body: bytes,
    *,
    max_bytes: int,
    content_encoding: str | None = None,
    headers: Mapping[str, Any] | None = None,
    user_id: str | None = None,
    trusted_publishers: frozenset[str] = frozenset(),
) -> Decoded:
    """Return the run in *body*; raise :class:`MessageRefusedError`, which names the field and what is expected.

    The body may be compressed, and may be a CloudEvent with the run in its data. The digest is SHA-256 over the run's
    canonical JSON (sorted keys, no white space), unknown fields included, as in every version since the first.
    """
    _check_publisher(user_id, trusted_publishers)
    body, event_id = open_envelope(body, max_bytes=max_bytes, content_encoding=content_encoding, headers=headers)
    document, is_regular = _document_in(body)
    if not isinstance(document, dict):
        found = describe_value(document)
        raise MessageRefusedError("schema_violation", f"the body is {found}; expected one JSON object")
    run = _strict_run_in(body) if is_regular else None
    adjustments: tuple[Adjustment, ...] = ()
    if run is None:
        run, adjustments = normalize(document)
    return Decoded(run, _digest(document, is_regular=is_regular), event_id, adjustments)


def _check_publisher(user_id: str | None, trusted: frozenset[str]) -> None:
    if trusted and user_id not in trusted:
        found = "none" if user_id is None else describe_value(user_id)
        raise MessageRefusedError(
            "untrusted_publisher", f"property user_id: found {found}; expected one of TRUSTED_PUBLISHERS"
        )


def _document_in(body: bytes) -> tuple[Any, bool]:
    """Return the JSON in *body*, and whether the strict decoder may read it too."""
    try:
        document = _any_json.decode(body)
        # The decoders skip parts that they do not need; their bytes must still be UTF-8.
        body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _lenient_document_in(body, error), False
    return document, True


def _lenient_document_in(body: bytes, error: Exception) -> Any:  # noqa: ANN401 - any JSON
    """Return JSON with half surrogate pairs, very long numbers or very deep nesting; refuse what is no JSON."""
    try:
        if isinstance(error, RecursionError):
            body = _without_depth(body)
        return json.loads(body.decode(), parse_float=Numeral, parse_int=_integer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise MessageRefusedError("invalid_json", explain_malformed(body, error)) from None


def _integer(digits: str) -> int | Numeral:
    return int(digits) if len(digits) <= _DIGITS_MAX else Numeral(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_depth(body: bytes) -> bytes:
    """Return *body* with null in place of each object and list below the deepest level that is read."""
    kept: list[bytes] = []
    level = start = 0
    for found in _STRUCTURE.finditer(body):
        text = found[0]
        if text[:1] in b"[{":
            if level <= _LEVELS_MAX < level + len(text):
                kept.append(body[start : found.start() + _LEVELS_MAX - level])
            level += len(text)
        elif text[:1] in b"]}":
            if level - len(text) <= _LEVELS_MAX < level:
                kept.append(b"null")
                start = found.start() + level - _LEVELS_MAX
            level -= len(text)
    return b"".join((*kept, body[start:] if level <= _LEVELS_MAX else b""))


def _digest(document: dict[str, Any], *, is_regular: bool) -> bytes:
    if is_regular:
        return sha256(_canonical.encode(document)).digest()
    return sha256(json.dumps(document, sort_keys=True).encode()).digest()


def _strict_run_in(body: bytes) -> CompletedRun | None:
    """Return the run in *body* if it is in the strict form."""
    try:
        run = _strict.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    # JSON can express NUL only with this escape, so most messages need no search.
    return run if b"\\u0000" not in body and _keeps_rules(run) else None


def _keeps_rules(run: CompletedRun) -> bool:
    """Return whether *run* keeps the rules of the strict form that its type does not express."""
    if run.run_ref is not None:
        return False  # not a field of the message
    if not (EARLIEST <= run.started_at < LATEST and EARLIEST <= run.completed_at < LATEST):
        return False
    if not _is_amount(run.usage.cost_usd) or not is_plain(run.metadata):
        return False
    if run.parent_run_id is not None and same_uuid(run.parent_run_id) != run.parent_run_id:
        return False
    return len({step.index for step in run.steps}) == len(run.steps) and all(
        _is_amount(step.cost_usd) and (step.started_at is None or EARLIEST <= step.started_at < LATEST)
        for step in run.steps
    )


def _is_amount(cost: Money | None) -> bool:
    if cost is None:
        return True
    # is_finite first: comparing NaN raises.
    if not cost.is_finite() or cost < 0 or cost >= MAX_COST_USD:
        return False
    exponent = cost.as_tuple().exponent
    return not isinstance(exponent, int) or -exponent <= MAX_COST_DECIMALS
