"""Valid traceparents by W3C's rules; invalid ones are ignored."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from consumer.contract.events import events_for, trace_in
from consumer.contract.trace_context import TraceContext, context_in, valid_traceparent
from domains.incidents.rules import finding_for
from domains.policies.rules import PolicySet, evaluate
from tests.support import run_messages as runs

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"
INVALID = [
    "",
    "00",
    VALID.upper(),
    VALID + "-",
    VALID + "-more",
    VALID + "0",
    VALID + "\n",
    " " + VALID,
    VALID.replace("-", "_"),
    f"ff-{TRACE}-{SPAN}-01",
    f"0g-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE[:-1]}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}f-01",
    f"00-{TRACE}-{SPAN}-1",
    f"00-{TRACE}-{SPAN}-0x",
    f"01-{TRACE}-{SPAN}-01more",
    "00-" + "٤" * 32 + f"-{SPAN}-01",
]


@pytest.mark.parametrize("flags", ["00", "01", "02", "03", "ff"])
def test_a_valid_traceparent_is_propagated_unmodified(flags):
    text = f"00-{TRACE}-{SPAN}-{flags}"
    assert context_in({"traceparent": text}) == (text, None)


@pytest.mark.parametrize("found", [VALID, VALID.encode(), bytearray(VALID.encode())], ids=lambda v: type(v).__name__)
def test_a_traceparent_is_read_from_each_amqp_text_type(found):
    assert context_in({"traceparent": found, "other": 1}) == (VALID, None)


@pytest.mark.parametrize("found", [*INVALID, None, 5, True, {"a": VALID}, [VALID], b"\xff" * 55])
def test_an_invalid_traceparent_is_ignored(found):
    assert context_in({"traceparent": found, "tracestate": "a=1"}) is None


@pytest.mark.parametrize("headers", [None, {}, {"tracestate": "a=1"}, {"Traceparent": VALID}])
def test_a_message_without_a_traceparent_has_no_trace(headers):
    assert context_in(headers) is None


@pytest.mark.parametrize("later", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-fd-what-the-future\nwill bring"])
def test_a_later_traceparent_version_is_propagated_as_00_with_the_known_flags(later):
    assert context_in({"traceparent": later}) == (VALID, None)


@pytest.mark.parametrize(
    "state", ["a=1", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "fw529a3039@dt=FfAB; x , b= y", "a=1,,b=2", "0a*/-_=~!"]
)
def test_a_valid_tracestate_is_propagated(state):
    assert context_in({"traceparent": VALID, "tracestate": state}) == (VALID, state)


@pytest.mark.parametrize(
    "state",
    [
        "",
        "a",
        "A=1",
        "a=1=2",
        "a=ä",
        "a=\n",
        "=1",
        "a=",
        "a" * 257 + "=1",
        "a=" + "1" * 511,
        "a=1," * 32 + "a=1",
        5,
        None,
    ],
)
def test_an_invalid_tracestate_is_dropped_and_the_traceparent_kept(state):
    assert context_in({"traceparent": VALID, "tracestate": state}) == (VALID, None)


@given(
    st.tuples(
        st.sampled_from(["00", "01", "fe", "ff", "0"]),
        st.integers(0, 2**130).map("{:032x}".format) | st.just("0" * 32),
        st.integers(0, 2**64 - 1).map("{:016x}".format) | st.just("0" * 16),
        st.sampled_from(["00", "01", "ff", "1", "01-", "01-x", "0G"]),
    ).map("-".join)
)
def test_opentelemetry_accepts_every_accepted_traceparent_with_the_same_span(text):
    context = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": text})).get_span_context()
    found = valid_traceparent(text)
    assert (found is not None) == context.is_valid
    if found:
        assert found[3:52] == f"{context.trace_id:032x}-{context.span_id:016x}"


@pytest.mark.parametrize("trace", [None, TraceContext(VALID), TraceContext(VALID, "a=1")])
def test_a_stored_event_keeps_its_trace_for_a_later_publisher(trace: TraceContext | None):
    for event in _events(trace):
        assert event.trace == trace_in(event.body) == trace
        document = json.loads(event.body)
        assert {name: document.get(name) for name in ("traceparent", "tracestate") if name in document} == (
            trace.headers if trace else {}
        )


def test_text_in_a_run_is_not_read_as_a_trace():
    assert {trace_in(event.body) for event in _events(None, agent_id='","traceparent":"' + VALID)} == {None}


def _events(trace: TraceContext | None, **changes: Any) -> Any:
    run, now = runs.run(**changes), datetime.now(UTC)
    return events_for(
        run,
        finding_for(run, suppressed_by=None, now=now),
        evaluate(run, PolicySet(())),
        trace_id=run.trace_id,
        now=now,
        trace=trace,
    )
