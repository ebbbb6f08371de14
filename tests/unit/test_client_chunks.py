"""Messages of a download, read by hand, are what the generated class reads."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from exportd._chunks import METHOD, Chunk, read_chunk
from exportd.v1 import export_service_pb2 as pb

data = st.one_of(st.binary(max_size=300), st.just(b"x" * 70_000))
metadata = st.builds(pb.DownloadMetadata, file_name=st.text(), total_bytes=st.just(7))
messages = st.builds(
    pb.StreamDownloadResponse,
    offset=st.integers(-(2**63), 2**63 - 1),
    crc32c=st.integers(0, 2**32 - 1),
    data=data,
    metadata=st.none() | metadata,
)


def by_class(wire: bytes) -> Chunk | None:
    try:
        message = pb.StreamDownloadResponse.FromString(wire)
    except DecodeError:
        return None
    return Chunk(
        message.offset,
        message.crc32c,
        memoryview(message.data),
        message.metadata if message.HasField("metadata") else None,
    )


def by_hand(wire: bytes) -> Chunk | None:
    try:
        return read_chunk(wire)
    except DecodeError:
        return None


@given(messages)
def test_every_message_is_read_as_it_was_written(
    message: pb.StreamDownloadResponse,
) -> None:
    wire = message.SerializeToString()
    assert by_hand(wire) == by_class(wire)


@given(messages, messages, st.binary(max_size=20), st.integers(0, 40))
@example(pb.StreamDownloadResponse(data=b"1"), pb.StreamDownloadResponse(), b"\x12", 0)
def test_so_is_what_has_fields_twice_unknown_ones_or_is_cut(
    one: pb.StreamDownloadResponse, two: pb.StreamDownloadResponse, more: bytes, cut: int
) -> None:
    wire = one.SerializeToString() + more + two.SerializeToString()
    assert by_hand(wire) == by_class(wire)
    wire = wire[: max(0, len(wire) - cut)]
    assert by_hand(wire) == by_class(wire)


def varint(length: int, low: int) -> bytes:
    """A number in so many bytes, in its shortest form or not."""
    return bytes([low & 0x7F | 0x80, *[0x80] * (length - 2), 0])[-length:]


fields = st.one_of(
    st.builds(
        lambda n, low: b"\x10" + varint(n, low), st.integers(1, 12), st.integers(0, 9)
    ),
    st.builds(lambda crc: b"\x1d" + crc, st.binary(min_size=3, max_size=4)),
    st.builds(
        lambda n, data: b"\x7a" + varint(n, len(data)) + data,
        st.integers(2, 12),
        st.binary(max_size=9),
    ),
    st.binary(max_size=3),
)


@given(st.lists(fields, max_size=4).map(b"".join))
@example(b"\x10\x81" + b"\x80" * 9 + b"\x00\x7a\x01x")
@example(b"\x10\x81" + b"\x80" * 8 + b"\x01\x7a\x01x")
@example(b"\x10" + b"\xff" * 8 + b"\x7f\x7a\x01x")
@example(b"\x7a\x81" + b"\x80" * 4 + b"\x00x")
@example(b"\x7a\x81\x80\x80\x80\x00x")
@example(b"\x10" + b"\x81" * 11 + b"\x10\x7f\x7a\x01x")
def test_so_are_numbers_longer_than_they_need_be(wire: bytes) -> None:
    assert by_hand(wire) == by_class(wire)


@pytest.mark.parametrize("start", [b"\x10", b"\x7a"])
def test_a_number_without_an_end_is_refused_at_once(start: bytes) -> None:
    with pytest.raises(DecodeError):
        read_chunk(start + bytes([0xFF]) * 2**20)


def test_data_stays_where_it_came_in() -> None:
    wire = pb.StreamDownloadResponse(offset=5, crc32c=6, data=b"abc").SerializeToString()
    chunk = read_chunk(wire)
    assert chunk.data.obj is wire
    assert (chunk.offset, chunk.crc32c, bytes(chunk.data)) == (5, 6, b"abc")


def test_the_method_is_the_contracts() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    method = service.methods_by_name["StreamDownload"]
    assert f"/{service.full_name}/{method.name}" == METHOD
