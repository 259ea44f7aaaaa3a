"""An encoding, a byte order mark or a CloudEvents envelope around a run is read, and is bounded."""

import gzip
import json
import tracemalloc
import zlib
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from backports import zstd

from consumer.contract.refusals import MessageRefusedError
from consumer.contract.run_message import Decoded, decode
from tests.support import run_messages as runs

LIMIT = 1_048_576


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}


def read(body: bytes, **properties: Any) -> Decoded:
    return decode(body, **{"max_bytes": LIMIT, **properties})


def refusal(body: bytes, **properties: Any) -> tuple[str, str]:
    with pytest.raises(MessageRefusedError) as caught:
        read(body, **properties)
    return caught.value.reason, str(caught.value)


def structured(data: object, **attributes: object) -> bytes:
    fields = {"specversion": "1.0", "type": "run.completed", "source": "/runner", "id": "e-1", **attributes}
    return json.dumps(fields if data is None else {**fields, "data": data}).encode()


@pytest.mark.parametrize("encoding", [None, "", "identity", "UTF-8", " utf8 "])
def test_a_plain_body_may_declare_an_encoding_that_means_plain(encoding):
    body = runs.body()
    assert read(body, content_encoding=encoding) == read(body)


@pytest.mark.parametrize("encoding", sorted(ENCODERS))
@pytest.mark.parametrize("spelling", [str.lower, str.upper])
def test_a_compressed_body_has_the_same_meaning_as_the_plain_one(encoding, spelling):
    body = runs.body()
    assert read(ENCODERS[encoding](body), content_encoding=spelling(encoding)) == read(body)


def test_deflate_may_be_a_raw_stream_and_gzip_and_zstd_may_have_several_parts():
    body = runs.body()
    first, second = body[:50], body[50:]
    assert read(raw_deflate(body), content_encoding="deflate") == read(body)
    assert read(gzip.compress(first) + gzip.compress(second), content_encoding="gzip") == read(body)
    assert read(zstd.compress(first) + zstd.compress(second), content_encoding="zstd") == read(body)


@pytest.mark.parametrize("encoding", sorted(ENCODERS))
def test_an_uncompressed_body_declared_as_compressed_is_read_unmodified(encoding):
    body = b"\n " + runs.body()
    assert read(body, content_encoding=encoding).run == read(body).run


@pytest.mark.parametrize("encoding", sorted(ENCODERS))
def test_a_compressed_body_that_is_damaged_or_cut_is_refused(encoding):
    compressed = ENCODERS[encoding](runs.body())
    for damaged in (compressed[:-9], compressed[: len(compressed) // 2], b"\x00" * 40, b""):
        reason, error = refusal(damaged, content_encoding=encoding)
        assert (reason, encoding in error) == ("invalid_json", True)


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, gzip", "x" * 5000])
def test_another_encoding_is_refused(encoding):
    reason, error = refusal(runs.body(), content_encoding=encoding)
    assert reason == "unsupported_content_type"
    assert error.startswith("property content_encoding: found ")
    assert len(error) <= 500


@pytest.mark.parametrize("encoding", sorted(ENCODERS))
def test_a_compression_bomb_takes_no_more_memory_than_the_message_limit(encoding):
    bomb = ENCODERS[encoding](b" " * 200_000_000)
    tracemalloc.start()
    try:
        assert refusal(bomb, content_encoding=encoding)[0] == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_many_empty_parts_are_refused_instead_of_being_read_one_by_one(encoding):
    reason, error = refusal(ENCODERS[encoding](b"") * 20_000, content_encoding=encoding)
    assert (reason, "more than 16 parts" in error) == ("invalid_json", True)


def test_the_limit_holds_before_and_after_decompression():
    body = runs.body()
    compressed = gzip.compress(body)
    assert read(compressed, content_encoding="gzip", max_bytes=len(body)) == read(body)
    assert refusal(compressed, content_encoding="gzip", max_bytes=len(body) - 1)[0] == "too_large"
    assert refusal(compressed, content_encoding="gzip", max_bytes=len(compressed) - 1)[0] == "too_large"


def test_a_byte_order_mark_is_skipped_within_a_compressed_body_too():
    body = runs.body()
    marked = b"\xef\xbb\xbf" + body
    assert read(marked) == read(body)
    assert read(gzip.compress(marked), content_encoding="gzip") == read(body)
    assert refusal(b"\xef\xbb\xbf")[0] == "invalid_json"


def test_a_structured_cloud_event_is_unwrapped_and_its_id_is_kept():
    body = runs.body()
    run = json.loads(body)
    for event in (
        structured(run),
        structured(body.decode()),
        structured(None, data_base64=b64encode(body).decode()),
        b"\xef\xbb\xbf" + structured(run),
    ):
        assert read(event) == read(body)._replace(event_id="e-1")


def test_half_a_surrogate_pair_in_an_event_is_read_as_without_the_envelope():
    run = runs.message(error_message="a\ud800b")
    decoded = read(json.dumps({"specversion": "1.0", "id": "e", "data": run}).encode())
    assert (decoded.run.error_message, [a.field for a in decoded.adjustments]) == ("a\ufffdb", ["error_message"])
    assert read(structured(runs.message(), id="\ud800")).event_id == "\ud800"


def test_the_digest_of_a_run_does_not_depend_on_its_envelope():
    body = runs.body()
    digests = {
        read(body).digest,
        read(structured(json.loads(body))).digest,
        read(structured(json.loads(body), id="2")).digest,
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["cloudEvents:id", "cloudEvents_id", "CLOUDEVENTS:ID"])
def test_the_id_of_a_binary_cloud_event_is_kept(name):
    headers = {"cloudEvents:specversion": "1.0", name: "e-2", "cloudEvents:identity": "another"}
    assert read(runs.body(), headers=headers).event_id == "e-2"


@pytest.mark.parametrize(
    "headers", [{}, {"cloudEvents:id": 7}, {"cloudEvents:id": ""}, {"id": "e"}, {"cloudEvents:ids": "e"}]
)
def test_other_headers_are_not_an_event_id(headers):
    assert read(runs.body(), headers=headers).event_id is None


def test_a_run_with_an_unknown_field_called_specversion_is_still_a_run():
    body = runs.body(specversion="1.0", data={"tenant_id": "another"})
    assert read(body).run.tenant_id == json.loads(body)["tenant_id"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (structured(None), "schema_violation"),
        (structured(None, data_base64="?"), "invalid_json"),
        (structured(None, data_base64=7), "schema_violation"),
        (structured([1]), "schema_violation"),
        (b'{"specversion": "1.0", "data": null}', "schema_violation"),
        (structured({}), "schema_violation"),
        (structured("no json"), "invalid_json"),
        (b'[{"specversion": "1.0"}]', "schema_violation"),
        (b'{"specversion": "1.0"', "invalid_json"),
    ],
)
def test_an_event_without_a_run_is_refused(event, reason):
    assert refusal(event)[0] == reason
