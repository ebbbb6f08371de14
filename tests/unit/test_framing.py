"""Hand-written messages are the generated class's messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exportd.v1 import export_service_pb2
from exportd_server.api.framing import data_head, usual_head_length


@given(
    offset=st.integers(0, 2**63 - 1),
    crc32c=st.integers(0, 2**32 - 1),
    data=st.one_of(st.binary(max_size=300), st.just(b"x" * 70_000), st.just(b"")),
)
def test_a_head_and_its_data_are_what_the_generated_class_writes(
    offset: int, crc32c: int, data: bytes
) -> None:
    expected = export_service_pb2.StreamDownloadResponse(
        offset=offset, crc32c=crc32c, data=data
    )
    message = data_head(offset, crc32c, len(data)) + data
    assert message == expected.SerializeToString()
    assert export_service_pb2.StreamDownloadResponse.FromString(message) == expected


@given(
    offset=st.one_of(
        st.integers(0, 2**63 - 1),
        st.integers(0, 62).flatmap(lambda bits: st.sampled_from([2**bits - 1, 2**bits])),
    ),
    crc32c=st.integers(1, 2**32 - 1),
    count=st.integers(1, 2**31),
)
def test_the_length_of_a_head_is_known_before_its_checksum(
    offset: int, crc32c: int, count: int
) -> None:
    assert usual_head_length(offset, count) == len(data_head(offset, crc32c, count))
