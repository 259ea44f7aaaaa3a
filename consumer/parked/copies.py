"""Copies of a delivery to the parked queue and to the retry queue.

A copy is confirmed before its delivery is acked, so that a message is never lost and never loops.
"""

from datetime import UTC, datetime
from typing import Any

from aiormq import spec
from aiormq.abc import DeliveredMessage
from pamqp import encode

from consumer.amqp.confirmed_channel import ConfirmedChannel
from consumer.amqp.lenient_codec import writable
from consumer.contract.names import (
    ATTEMPTS_HEADER,
    DROPPED_HEADER,
    ERROR_HEADER,
    EXCHANGE_HEADER,
    FIRST_SEEN_HEADER,
    PARKED_AT_HEADER,
    PARKED_QUEUE,
    PERSISTENT,
    REASON_HEADER,
    RETRY_QUEUE,
    ROUTING_KEY_HEADER,
)
from consumer.contract.refusals import ParkReason

# Properties that the broker acts on: user_id is checked against the connection, expiration would expire the copy, and
# CC and BCC would route it elsewhere. A copy carries them as headers of these names instead.
_SET_ASIDE = {"user_id": "x-closeout-user-id", "expiration": "x-closeout-expiration"}
_SET_ASIDE_HEADERS = {"CC": "x-closeout-cc", "BCC": "x-closeout-bcc"}

# Bytes per frame if the broker sets no limit (frame_max = 0): the broker's default.
_FRAME_BYTES = 131_064
# Bytes of a header frame in addition to the properties: class, body size, flags and the worker's user.
_HEADER_FRAME_BYTES = 300


def attempts_of(message: DeliveredMessage) -> int:
    """Return the attempts counted in the message's header; 0 if the header is missing or invalid."""
    attempts = headers_of(message).get(ATTEMPTS_HEADER)
    return attempts if isinstance(attempts, int) and not isinstance(attempts, bool) and attempts > 0 else 0


def headers_of(message: DeliveredMessage) -> dict[str, Any]:
    """Return the message's headers; empty if it has none."""
    return dict(message.header.properties.headers or {})


async def park(
    channel: ConfirmedChannel, message: DeliveredMessage, *, reason: ParkReason, error: str, attempts: int
) -> None:
    """Publish a copy of *message* to the parked queue; raise ``UnavailableError`` unless it is confirmed."""
    headers: dict[str, str | int] = {
        REASON_HEADER: reason,
        ERROR_HEADER: error.replace("\x00", "\\u0000"),
        ATTEMPTS_HEADER: attempts,
        PARKED_AT_HEADER: datetime.now(UTC).isoformat(),
    }
    await _copy(channel, message, PARKED_QUEUE, headers)


async def retry_later(
    channel: ConfirmedChannel, message: DeliveredMessage, *, attempts: int, error: str, trusted: bool = True
) -> None:
    """Publish a copy of *message* to the retry queue, which returns it after a delay; raises as :func:`park`.

    The copy comes back as a trusted publisher's message unless it is not *trusted*.
    """
    first_seen = headers_of(message).get(FIRST_SEEN_HEADER, datetime.now(UTC).isoformat())
    headers: dict[str, str | int] = {
        ATTEMPTS_HEADER: attempts,
        FIRST_SEEN_HEADER: str(first_seen)[:64],
        ERROR_HEADER: error.replace("\x00", "\\u0000"),
    }
    # Makes the copy a trusted publisher's message: the broker verifies user_id.
    await _copy(channel, message, RETRY_QUEUE, headers, user_id=channel.user if trusted else None)


async def _copy(
    channel: ConfirmedChannel,
    message: DeliveredMessage,
    queue: str,
    ours: dict[str, str | int],
    *,
    user_id: str | None = None,
) -> None:
    frame_bytes = (await channel.opened()).max_content_size
    properties = _copied_properties(message, ours, frame_bytes)
    properties.user_id = user_id
    await channel.send_to_queue(queue, body=message.body, properties=properties)


def _copied_properties(
    message: DeliveredMessage, ours: dict[str, str | int], frame_bytes: int
) -> spec.Basic.Properties:
    original = message.header.properties
    kept = {name: getattr(original, name) for name in spec.Basic.Properties.attributes()}
    kept["cluster_id"] = ""  # deprecated in AMQP; pamqp refuses to write it
    headers: dict[str, Any] = writable(headers_of(message))
    for name, header in _SET_ASIDE.items():
        if kept[name] is not None:
            headers.setdefault(header, kept[name])  # a copy that came back already has the sender's
            kept[name] = None
    for name, header in _SET_ASIDE_HEADERS.items():
        if name in headers:
            headers[header] = headers.pop(name)
    # A message from the retry queue has no exchange; its header names the original one.
    if message.exchange or EXCHANGE_HEADER not in headers:
        headers |= {EXCHANGE_HEADER: message.exchange or "", ROUTING_KEY_HEADER: message.routing_key or ""}
    headers.update(ours)
    kept |= {"headers": None, "delivery_mode": PERSISTENT}
    others = len(spec.Basic.Properties(**kept).marshal()) + _HEADER_FRAME_BYTES
    kept["headers"] = _fitted(headers, ours, (frame_bytes if frame_bytes > 0 else _FRAME_BYTES) - others)
    return spec.Basic.Properties(**kept)


def _fitted(headers: dict[str, Any], ours: dict[str, str | int], room: int) -> dict[str, Any]:
    """Drop the sender's largest headers until all fit into *room* bytes, and list their names in a header.

    A copy with an oversized frame closes the connection, and the redelivered message would do so again.
    """
    sizes = {name: _size(name, value) for name, value in headers.items()}
    dropped: list[str] = []
    for name in sorted(set(headers) - set(ours), key=sizes.__getitem__, reverse=True):
        if sum(sizes.values()) <= room:
            break
        del headers[name], sizes[name]
        dropped.append(name)
        headers[DROPPED_HEADER] = ", ".join(dropped)[:1000]
        sizes[DROPPED_HEADER] = _size(DROPPED_HEADER, headers[DROPPED_HEADER])
    return headers


def _size(name: str, value: object) -> int:
    return len(encode.field_table({name: value}))  # type: ignore[dict-item]
