"""Reads the envelope of a run: the encoding, a byte order mark, a CloudEvents envelope. All bounded.

Neither the content type nor an envelope decides whether a run is accepted: a body that is one JSON object is.
"""

import json
import zlib
from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from backports import zstd

from consumer.contract.refusals import MessageRefusedError, describe_value

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15  # zlib's window bits
# Members of a gzip file or frames of zstd. Each costs a copy of what follows it.
_PARTS_MAX = 16
_PLAIN = frozenset({"", "identity", "utf-8", "utf8"})
# AMQP headers of a CloudEvent in binary mode: the first spelling is the AMQP binding's, the second one JMS's.
_BINARY_PREFIXES = ("cloudevents:", "cloudevents_")


class Opened(NamedTuple):
    """The JSON text of a run, and the id of the CloudEvent that it came in, if any."""

    body: bytes
    event_id: str | None = None


class _CloudEvent(msgspec.Struct):
    id: Any = None
    specversion: Any = None
    schema_version: Any = msgspec.UNSET
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    data_base64: Any = None


_cloud_event = msgspec.json.Decoder(_CloudEvent)


def open_envelope(
    body: bytes, *, max_bytes: int, content_encoding: str | None = None, headers: Mapping[str, Any] | None = None
) -> Opened:
    """Return the JSON text in *body*, decompressed and unwrapped; raise :class:`MessageRefusedError` if that fails.

    No more than *max_bytes* are ever decompressed. The result is not checked to be JSON.
    """
    _check_size(len(body), max_bytes)
    if content_encoding and content_encoding.strip().lower() not in _PLAIN:
        body = _decompressed(body, content_encoding, max_bytes)
    body = body.removeprefix(_BYTE_ORDER_MARK)
    if b'"specversion"' in body:
        return _unwrapped(body, max_bytes)
    return Opened(body, _binary_event_id(headers) if headers else None)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MessageRefusedError(
            "too_large", f"the body has {size} bytes; the limit is {max_bytes} (MESSAGE_MAX_BYTES)"
        )


def _decompressed(body: bytes, encoding: str, max_bytes: int) -> bytes:
    decompress = _DECOMPRESSORS.get(encoding.strip().lower())
    if decompress is None:
        raise MessageRefusedError(
            "unsupported_content_type",
            f"property content_encoding: found {describe_value(encoding)}; expected gzip, deflate, zstd or none",
        )
    try:
        found = decompress(body, max_bytes + 1)
    except (zlib.error, zstd.ZstdError, EOFError) as error:
        if body.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"{":
            return body  # declared as compressed, sent as it is
        raise MessageRefusedError(
            "invalid_json", f"property content_encoding is {describe_value(encoding)}, but the body is not: {error}"
        ) from None
    if len(found) > max_bytes:
        raise MessageRefusedError(
            "too_large", f"the body has more than {max_bytes} bytes after decompression (MESSAGE_MAX_BYTES)"
        )
    return found


def _inflated(body: bytes, at_most: int, window_bits: int) -> bytes:
    found = b""
    for _ in range(_PARTS_MAX):
        stream = zlib.decompressobj(window_bits)
        found += stream.decompress(body, at_most - len(found))
        if len(found) >= at_most:
            return found
        if not stream.eof:
            raise EOFError("it ends early")
        body = stream.unused_data
        if window_bits != _GZIP or not body.startswith(b"\x1f\x8b"):
            return found
    raise EOFError(f"it has more than {_PARTS_MAX} parts")


def _gunzipped(body: bytes, at_most: int) -> bytes:
    return _inflated(body, at_most, _GZIP)


def _undeflated(body: bytes, at_most: int) -> bytes:
    # RFC 9110 means zlib's format; some senders write a raw deflate stream.
    try:
        return _inflated(body, at_most, _ZLIB)
    except zlib.error:
        return _inflated(body, at_most, _RAW_DEFLATE)


def _unzstd(body: bytes, at_most: int) -> bytes:
    found = b""
    for _ in range(_PARTS_MAX):
        stream = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
        found += stream.decompress(body, at_most - len(found))
        if len(found) >= at_most:
            return found
        if not stream.eof:
            raise EOFError("it ends early")
        body = stream.unused_data
        if not body:
            return found
    raise EOFError(f"it has more than {_PARTS_MAX} parts")


# Bytes, as a power of two, that a frame may ask to be kept while it is decompressed: 8 MiB, RFC 8878's recommendation.
_ZSTD_OPTIONS: Mapping[int, int] = {zstd.DecompressionParameter.window_log_max: 23}
_DECOMPRESSORS: Mapping[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzipped,
    "x-gzip": _gunzipped,
    "deflate": _undeflated,
    "zstd": _unzstd,
}


def _unwrapped(body: bytes, max_bytes: int) -> Opened:
    """Return the run in a structured CloudEvent; *body* itself if it is none, or not readable as one."""
    event = _event_in(body)
    if event is None:
        return Opened(body)  # the decoder reports the error
    if event.specversion is None or event.schema_version is not msgspec.UNSET:
        return Opened(body)  # a run that has a field of that name
    event_id = event.id if isinstance(event.id, str) and event.id else None
    if isinstance(event.data, msgspec.Raw):
        data = bytes(event.data)
        if data.startswith(b'"'):  # some senders embed the JSON text as a string
            data = msgspec.json.decode(data).encode("utf-8", "replace")
    elif isinstance(event.data_base64, str):
        try:
            data = b64decode(event.data_base64, validate=True)
        except ValueError:
            raise MessageRefusedError("invalid_json", "data_base64: found text that is not base64") from None
    else:
        raise MessageRefusedError("schema_violation", "data: missing; expected the run in the CloudEvent's data")
    _check_size(len(data), max_bytes)
    return Opened(data.removeprefix(_BYTE_ORDER_MARK), event_id)


def _event_in(body: bytes) -> _CloudEvent | None:
    try:
        return _cloud_event.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    # A text of the run may hold half of a surrogate pair, which only this decoder reads.
    try:
        found = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    data = msgspec.Raw(json.dumps(found["data"]).encode()) if "data" in found else msgspec.UNSET
    named = {name: found[name] for name in ("id", "specversion", "schema_version", "data_base64") if name in found}
    return _CloudEvent(**named, data=data)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _binary_event_id(headers: Mapping[str, Any]) -> str | None:
    for name, value in headers.items():
        folded = name.lower()
        if folded.startswith(_BINARY_PREFIXES) and folded[len(_BINARY_PREFIXES[0]) :] == "id":
            return value if isinstance(value, str) and value else None
    return None
