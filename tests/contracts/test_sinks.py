"""What every sink promises, each at its real receiver. A sink is added in
`tests.support.sink_cases`."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from exportd_server.errors import ConfigurationError, DeliveryFailed, StoreFailed
from exportd_server.sinks.base import (
    BadSinkRequest,
    Delivery,
    Export,
    Part,
    SinkType,
    Takes,
)
from tests.support.memory import MIB, apart, growing
from tests.support.sink_cases import CASES, SinkCase, data_of, opened
from tests.support.sinks import (
    BytesContent,
    GeneratedContent,
    StalledContent,
    a_part,
    an_export,
    deliver_part,
    deliver_whole,
)

HEAD = b"id,name\n"
SMALL = HEAD + b'1,"one"\n2,\n'
LARGE = HEAD + b'12345678901,"a name that is long enough to fill some space"\n' * 200_000
assert len(LARGE) > 11 * MIB
SIZES = pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> SinkCase:
    return CASES[request.param](request)


def takes(case: SinkCase) -> Takes:
    return case.sink_type.check(case.request, case.connection, an_export()).takes


def deliveries(case: SinkCase, *parts: Part) -> list[Delivery]:
    """All that the sink is given of an export, in order."""
    export = an_export()
    each = [deliver_part(export, part) for part in parts]
    whole = [deliver_whole(export, *parts)]
    return whole if takes(case) is Takes.WHOLE else each + whole


def first(case: SinkCase, part: Part) -> Delivery:
    """The delivery that brings the bytes of an export's only part."""
    return deliveries(case, part)[0]


@SIZES
async def test_all_arrives_as_it_is(case: SinkCase, data: bytes) -> None:
    parts = [a_part(data, prefix_bytes=len(HEAD)), a_part(SMALL, sequence=1)]
    async with opened(case) as sink:
        for delivery in deliveries(case, *parts):
            receipt = await sink.deliver(case.request, delivery)
            assert receipt.isprintable()
    assert case.arrived() == case.expected(data_of(parts))


async def test_a_part_without_bytes_arrives(case: SinkCase) -> None:
    if takes(case) is Takes.WHOLE:
        pytest.skip("it takes no files")
    part = a_part(b"", rows=0)
    async with opened(case) as sink:
        await sink.deliver(case.request, first(case, part))
    assert case.arrived() == case.expected({part.file_name: b""})


@SIZES
async def test_delivered_twice_is_as_delivered_once(case: SinkCase, data: bytes) -> None:
    """The second time as after a crash: by another process, and the attempt counts."""
    given = deliveries(case, a_part(data))
    async with opened(case) as sink:
        receipts = [await sink.deliver(case.request, delivery) for delivery in given]
    once = (case.arrived(), case.listed(), case.remains())
    async with opened(case) as sink:
        again = [
            await sink.deliver(case.request, replace(delivery, attempt=2))
            for delivery in given
        ]
    assert again == receipts
    assert (case.arrived(), case.listed(), case.remains()) == once


async def test_the_completion_lists_all_parts_in_order_and_comes_last(
    case: SinkCase,
) -> None:
    if not case.lists_parts:
        pytest.skip("its receiver is not told of parts")
    parts = [
        a_part(SMALL + b"%d,\n" % sequence, sequence=sequence) for sequence in range(12)
    ]
    *each, whole = deliveries(case, *parts)
    async with opened(case) as sink:
        for delivery in reversed(each):
            await sink.deliver(case.request, delivery)
        assert case.listed() is None
        await sink.deliver(case.request, whole)
    assert case.listed() == [part.file_name for part in parts]


@SIZES
async def test_a_part_that_cannot_be_read_to_its_end_leaves_nothing(
    case: SinkCase, data: bytes
) -> None:
    part = a_part(data, content=BytesContent(data, fails=StoreFailed()))
    async with opened(case) as sink:
        with pytest.raises((StoreFailed, DeliveryFailed)) as failed:
            await sink.deliver(case.request, first(case, part))
        assert getattr(failed.value, "retryable", False)
        assert case.remains() == []
        await sink.deliver(case.request, first(case, a_part(data)))
    assert case.arrived() == case.expected({part.file_name: data})


async def test_a_part_that_is_gone_is_left_to_the_caller(case: SinkCase) -> None:
    part = a_part(SMALL, content=BytesContent(SMALL, gone=True))
    async with opened(case) as sink:
        with pytest.raises(KeyError):
            await sink.deliver(case.request, first(case, part))
    assert case.remains() == []


@pytest.mark.parametrize("harm", ["changed", "shorter", "longer"])
@SIZES
async def test_bytes_that_are_not_those_of_the_part_leave_nothing(
    case: SinkCase, data: bytes, harm: str
) -> None:
    part = a_part(data)
    spoilt = {
        "changed": data[:-2] + b"x\n",
        "shorter": data[:-1],
        "longer": data + b"3,\n",
    }[harm]
    part = replace(part, content=BytesContent(spoilt))
    async with opened(case) as sink:
        with pytest.raises(DeliveryFailed) as failed:
            await sink.deliver(case.request, first(case, part))
    assert failed.value.retryable
    assert case.remains() == []


@SIZES
async def test_a_delivery_that_is_cancelled_leaves_nothing(
    case: SinkCase, data: bytes
) -> None:
    content = StalledContent(data)
    async with opened(case) as sink:
        task = asyncio.create_task(
            sink.deliver(case.request, first(case, a_part(data, content=content)))
        )
        await content.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert content.closed
        assert case.remains() == []


async def test_a_delivery_that_is_cancelled_anywhere_leaves_all_or_nothing(
    case: SinkCase,
) -> None:
    """After more and more steps of the event loop, until it gets to its end."""
    part = a_part(SMALL)
    steps, ended = 0, False
    async with opened(case) as sink:
        while not ended:
            task = asyncio.create_task(sink.deliver(case.request, first(case, part)))
            for _ in range(steps):
                await asyncio.sleep(0)
            ended = not task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert case.arrived() in ({}, case.expected({part.file_name: SMALL}))
            assert len(case.remains()) == len(case.arrived())
            steps += 1 + steps // 20


async def test_many_deliveries_go_on_at_once(case: SinkCase) -> None:
    """Of several jobs, each of them twice."""
    parts = [a_part(SMALL + b"%d,\n" % number, sequence=number) for number in range(12)]
    given = deliveries(case, *parts)
    async with opened(case) as sink:
        await asyncio.gather(
            *(sink.deliver(case.request, delivery) for delivery in [*given, *given])
        )
    assert case.arrived() == case.expected(data_of(parts))


async def test_the_event_loop_goes_on_meanwhile(case: SinkCase) -> None:
    block = b'123456789,"a name that is long enough to fill some space"\n' * 4096
    part = GeneratedContent(HEAD, block, 400).part()
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with opened(case) as sink:
        turning = asyncio.create_task(turn())
        await sink.deliver(case.request, first(case, part))
        turning.cancel()
    # One that holds the loop from its beginning to its end leaves it a handful; there are
    # a hundred thousand.
    assert turns > 1000


def growth_of_a_delivery(
    sink_type: SinkType[Any, Any], connection: Any, request: Any, deliveries: list[Delivery]
) -> float:
    """MiB that the last one takes, after the others."""

    async def deliver() -> float:
        sink = await sink_type.open(connection)
        *before, last = deliveries
        for delivery in before:
            await sink.deliver(request, delivery)
        with growing() as growth:
            await sink.deliver(request, last)
        await sink.close()
        return growth.mib

    return asyncio.run(deliver())


@pytest.mark.minutes
async def test_memory_does_not_grow_with_the_part(case: SinkCase) -> None:
    block = b'123456789,"a name that is long enough to fill some space"\n' * 4096
    part = GeneratedContent(HEAD, block, 100 * MIB // len(block)).part()
    assert part.bytes > 99 * MIB
    given = [first(case, a_part(LARGE, sequence=1)), first(case, part)]
    grown = apart(
        growth_of_a_delivery, case.sink_type, case.connection, case.request, given
    )
    # It was 16 for S3, which has several pieces under way, and 2 for the others.
    assert grown < 32
    (digest,) = [
        hashlib.sha256(data).digest()
        for name, data in case.arrived().items()
        if name.endswith(part.file_name)
    ]
    assert digest == part.sha256


async def test_a_probe_leaves_no_trace_and_finds_a_receiver_that_is_there(
    case: SinkCase,
) -> None:
    export = replace(an_export(), job_id="", file_stem="")
    async with opened(case) as sink:
        await sink.probe(case.request, export)
    assert case.remains() == []


async def test_a_receiver_that_is_not_there_is_found(case: SinkCase) -> None:
    with pytest.raises((ConfigurationError, DeliveryFailed, BadSinkRequest)):
        async with opened(case, case.broken) as sink:
            await sink.probe(case.request, an_export())


async def test_a_delivery_to_a_receiver_that_is_not_there_says_so(case: SinkCase) -> None:
    with pytest.raises((ConfigurationError, DeliveryFailed)):
        async with opened(case, case.broken) as sink:
            await sink.deliver(case.request, first(case, a_part(SMALL)))


def models(case: SinkCase) -> list[tuple[type[BaseModel], Any]]:
    found = [(case.sink_type.request_model, case.request)]
    if case.connection is not None:
        found.append((case.sink_type.connection_model, case.connection))
    return found


def test_models_refuse_what_they_do_not_know_and_do_not_change(case: SinkCase) -> None:
    for model, given in models(case):
        said = {name: getattr(given, name) for name in given.model_fields_set}
        assert model.model_validate(said) == given
        with pytest.raises(ValidationError):
            model.model_validate({**said, "unknown": 1})
        with pytest.raises(ValidationError, match="frozen"):
            setattr(given, next(iter(said)), None)


def test_a_check_asks_for_no_job(case: SinkCase) -> None:
    """There is none yet, when a request is checked."""
    export: Export = replace(an_export(), job_id="", file_stem="")
    plan = case.sink_type.check(case.request, case.connection, export)
    assert plan.takes in Takes
    assert case.remains() == []
