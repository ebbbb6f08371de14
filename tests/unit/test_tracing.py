"""What is read of a trace context that anybody may send, and how a tracer ends."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from exportd_server.platform import tracing
from exportd_server.platform.otel import OtelTracer, _parent
from exportd_server.platform.tracing import NO_TRACER, TraceContext, read_metadata
from exportd_server.settings import TracingSettings, read_headers
from tests.support.logs import json_log
from tests.support.traces import CALLER, TRACE, TRACEPARENT, trace_receiver
from tests.support.waits import ENOUGH

HEX = "0123456789abcdef"
KEYS = st.from_regex(r"[a-c][abc019_*/-]{0,9}(@[a-c][abc019_*/-]{0,13})?", fullmatch=True)
VALUES = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=",="),
    min_size=1,
    max_size=20,
)


def ids(length: int) -> st.SearchStrategy[str]:
    return st.text(HEX, min_size=length, max_size=length).filter(lambda t: t.strip("0"))


@given(ids(32), ids(16), st.integers(0, 255), st.dictionaries(KEYS, VALUES, max_size=8))
def test_a_context_comes_back_from_its_headers_and_from_its_text(
    trace: str, span: str, flags: int, members: dict[str, str]
) -> None:
    state = ",".join(f"{key}={value}" for key, value in members.items())
    context = TraceContext(trace, span, flags, state)
    headers = context.headers
    assert TraceContext.read(headers["traceparent"], headers.get("tracestate", "")) == (
        context
    )
    assert TraceContext.of_text(context.text) == context


@given(st.text(max_size=300), st.text(max_size=700))
def test_no_text_breaks_the_reader_or_passes_it_as_it_is(one: str, other: str) -> None:
    assert TraceContext.read(one, other) is None
    context = TraceContext.read(TRACEPARENT, other)
    assert context is not None
    assert len(context.state) <= 512
    assert re.fullmatch(r"[ -~]*", context.state)


@pytest.mark.parametrize(
    "text",
    [
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{CALLER}-01",
        f"{TRACEPARENT}-more",
        f"{TRACEPARENT}\n",
        TRACEPARENT.upper(),
        TRACEPARENT[:-1],
        f"01-{TRACE}-{CALLER}-01-{'x' * 300}",
    ],
)
def test_what_only_looks_like_a_traceparent_is_none(text: str) -> None:
    assert TraceContext.read(text) is None


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("a=1, b=2 ,,c=x y", "a=1,b=2,c=x y"),
        ("a=1,a=2", ""),
        ("A=1", ""),
        ("a", ""),
        ("1=1", ""),
        ("1@b=1", "1@b=1"),
        ("a@1=1", ""),
        ("a@b@c=1", ""),
        ("a=1\r\nx-evil: 1", ""),
        (",".join(f"k{n}=1" for n in range(33)), ""),
        ("a=" + "x" * 600, ""),
    ],
)
def test_a_tracestate_is_kept_as_a_whole_or_not_at_all(state: str, kept: str) -> None:
    context = TraceContext.read(TRACEPARENT, state)
    assert context is not None
    assert context.state == kept


@pytest.mark.parametrize("key", ["1a", "a@1", "a@b@c", "a@" + "b" * 15, "a/b", "1@b"])
def test_no_tracestate_of_a_caller_makes_the_library_log(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    _parent(TraceContext.read(TRACEPARENT, f"{key}=1"))
    assert caplog.records == []


def test_a_context_is_one_of_several_headers_only_when_it_is_there_once() -> None:
    parent = ("traceparent", TRACEPARENT)
    assert read_metadata([("other", b"\xff"), parent]) == TraceContext(TRACE, CALLER, 1)
    assert read_metadata([parent, parent]) is None
    assert read_metadata([("tracestate", "a=1")]) is None
    both = read_metadata([parent, ("tracestate", "a=1"), ("tracestate", "b=2")])
    assert both is not None
    assert both.state == "a=1,b=2"


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = TraceContext.read(f"01-{TRACE}-{CALLER}-01-later")
    assert context is not None
    assert context.traceparent == TRACEPARENT


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    with json_log() as stream:
        yield stream


def test_log_lines_tell_the_span_they_were_written_in(log: io.StringIO) -> None:
    logger = structlog.get_logger("exportd_server.test")
    context = TraceContext(TRACE, CALLER, 1)
    logger.info("before")
    with NO_TRACER.span("a step", parent=context) as span:
        assert span.context == context
        logger.info("within")
        with NO_TRACER.span("a step of it"):
            logger.info("deeper")
    logger.info("after")
    told = [json.loads(line) for line in log.getvalue().splitlines()]
    found = {each["event"]: (each.get("trace_id"), each.get("span_id")) for each in told}
    ids_ = (TRACE, CALLER)
    assert found == {
        "before": (None, None),
        "within": ids_,
        "deeper": ids_,
        "after": (None, None),
    }


async def test_a_receiver_that_hangs_is_not_waited_for_longer_than_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with trace_receiver(hangs=True) as receiver:
        tracer = OtelTracer(receiver.endpoint, 1.0, {})
        with tracer.span("a step"):
            pass
        assert await asyncio.to_thread(receiver.held.wait, ENOUGH)
        # Far below what the library would wait by itself.
        async with asyncio.timeout(20):
            await tracer.close(0.1)


async def test_spans_that_wait_are_sent_at_the_end_and_expected_errors_fail_none() -> None:
    with trace_receiver() as receiver:
        tracer = OtelTracer(receiver.endpoint, 1.0, {"x-key": "value"})
        parent = TraceContext(TRACE, CALLER, 1)
        with pytest.raises(KeyError), tracer.span("unexpected", parent=parent):
            raise KeyError("canary")
        with (
            pytest.raises(KeyError),
            tracer.span("expected", parent=parent, expected=(KeyError,)),
        ):
            raise KeyError("canary")
        with tracer.span("outer", parent=parent) as outer:
            assert tracing.current() is outer
            with tracer.span("inner"):
                pass
        assert tracing.current().context is None
        await tracer.close(10)
    by = {span.name: span for span in receiver.of_trace()}
    assert {name: span.error for name, span in by.items()} == {
        "unexpected": "KeyError",
        "expected": "",
        "outer": "",
        "inner": "",
    }
    assert by["inner"].parent == by["outer"].span
    assert {each["x-key"] for each in receiver.metadata} == {"value"}
    assert b"canary" not in receiver.raw


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"endpoint": "127.0.0.1:4317"}, "http://"),
        ({"endpoint": "http://collector"}, "HOST:PORT"),
        ({"endpoint": "http://collector:4317/v1/traces"}, "no more"),
        ({"endpoint": "http://me:canary@collector:4317"}, "tracing.headers"),
        ({"headers": "authorization=canary"}, "endpoint is missing"),
        ({"endpoint": "http://collector:4317", "headers": "a=canary"}, "on the way"),
        ({"endpoint": "https://collector:4317", "headers": "canary"}, "name=value"),
        ({"endpoint": "https://collector:4317", "headers": "a=canary%0A"}, "name=value"),
        ({"endpoint": "https://collector:4317", "headers": "a-bin=canary"}, "name=value"),
        ({"endpoint": "https://collector:4317", "sample_ratio": 1.5}, "less than or equal"),
    ],
)
def test_settings_that_cannot_work_say_why_without_a_secret(
    given_: dict[str, object], told: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        TracingSettings.model_validate(given_)
    said = " ".join(e["msg"] for e in refused.value.errors())
    assert told in said
    assert "canary" not in said


def test_headers_are_pairs_with_commas_between_and_percent_encoded() -> None:
    settings = TracingSettings.model_validate(
        {
            "endpoint": "http://127.0.0.1:4317",
            "headers": "Authorization=Bearer%20a%2Cb, x-team=data,",
        }
    )
    assert read_headers(settings.headers) == {
        "authorization": "Bearer a,b",
        "x-team": "data",
    }
    assert "Bearer" not in repr(settings)
