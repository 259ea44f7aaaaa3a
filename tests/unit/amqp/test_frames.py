"""The frames that are packed by hand equal those of the client library, byte for byte."""

from typing import Any

from aiormq import spec
from hypothesis import given
from hypothesis import strategies as st
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from consumer.amqp.frames import event_frames
from consumer.contract.events import CONTENT_TYPE
from consumer.contract.names import PERSISTENT
from consumer.contract.trace_context import TraceContext

NAMES = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=200)


@given(
    channel=st.integers(1, 65_535),
    routing_key=NAMES,
    ids=st.tuples(st.uuids(), st.uuids()),
    kind=NAMES,
    body=st.binary(max_size=500),
    body_max=st.integers(50, 600),
    trace=st.none() | st.builds(TraceContext, NAMES, st.none() | NAMES),
)
def test_event_frames_equal_those_of_the_client_library(
    channel: int, routing_key: str, ids: Any, kind: str, body: bytes, body_max: int, trace: TraceContext | None
) -> None:
    properties = spec.Basic.Properties(
        content_type=CONTENT_TYPE,
        delivery_mode=PERSISTENT,
        correlation_id=str(ids[0]),
        message_id=str(ids[1]),
        message_type=kind,
        headers=trace and {**trace.headers},
    )
    frames: list[Any] = [
        spec.Basic.Publish(exchange="governance.events", routing_key=routing_key, mandatory=True),
        ContentHeader(body_size=len(body), properties=properties),
        *(ContentBody(body[start : start + body_max]) for start in range(0, len(body), body_max)),
    ]

    assert event_frames(
        channel,
        exchange="governance.events",
        routing_key=routing_key,
        run_id=ids[0],
        event_id=str(ids[1]),
        kind=kind,
        body=body,
        body_max=body_max,
        trace=trace,
    ) == b"".join(frame.marshal(each, channel) for each in frames)
