"""Hand-written messages are the generated class's messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exportd.v1 import export_service_pb2
from exportd_server.api.framing import data_message


@given(
    offset=st.integers(0, 2**63 - 1),
    crc32c=st.integers(0, 2**32 - 1),
    data=st.one_of(st.binary(max_size=300), st.just(b"x" * 70_000), st.just(b"")),
)
def test_a_data_message_is_what_the_generated_class_writes(
    offset: int, crc32c: int, data: bytes
) -> None:
    expected = export_service_pb2.StreamDownloadResponse(
        offset=offset, crc32c=crc32c, data=data
    )
    message = data_message(offset, crc32c, memoryview(data))
    assert message == expected.SerializeToString()
    assert export_service_pb2.StreamDownloadResponse.FromString(message) == expected
