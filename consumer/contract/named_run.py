"""Finds the run that a message names, valid or not: for lists of parked messages, and for selecting them."""

from contextlib import suppress
from typing import Any

import msgspec

from consumer.contract.envelope import open_envelope
from consumer.contract.refusals import MessageRefusedError
from consumer.contract.scalars import text_of, uuid_of


class _Named(msgspec.Struct):
    tenant_id: Any = None
    run_id: Any = None


_named = msgspec.json.Decoder(_Named)


def named_run(body: bytes, *, content_encoding: str | None, max_bytes: int) -> tuple[str | None, str | None]:
    """Return tenant and run that *body* names, each ``None`` if it cannot be read; see :func:`usual_spelling`.

    A body of more than *max_bytes*, compressed or not, is not searched.
    """
    with suppress(MessageRefusedError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        opened = open_envelope(body, max_bytes=max_bytes, content_encoding=content_encoding)
        named = _named.decode(opened.body)
        tenant, run = (
            value if isinstance(value, str) else None for value in map(text_of, (named.tenant_id, named.run_id))
        )
        return tenant, usual_spelling(run) if run else run
    return None, None


def usual_spelling(run_id: str) -> str:
    """Return a UUID in lower case with hyphens, and any other text as it is."""
    found = uuid_of(run_id)
    return run_id if found is None else str(found)
