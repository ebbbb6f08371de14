"""Readers of one file over loopback, each in a process of its own: `python -m
bench.readers exportd|client|flight|http ADDRESS [JOB [RANGES]]`.

A reader takes the bytes and drops them, but for the client, which writes and verifies a
file in memory. It tells what it did as one JSON object.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
_ROOM = 2**20
_LARGEST_MESSAGE = 8 * 2**20


def exportd_stream(address: str, job_id: str) -> Callable[[], int]:
    """StreamDownload as the Python client reads it; the checksum of each message is
    verified."""
    import grpc  # noqa: PLC0415 - a reader loads what it needs
    from crc32c import crc32c  # noqa: PLC0415

    from exportd._chunks import METHOD, read_chunk  # noqa: PLC0415
    from exportd.v1 import export_service_pb2  # noqa: PLC0415

    channel = grpc.insecure_channel(
        address, [("grpc.max_receive_message_length", _LARGEST_MESSAGE)]
    )
    request = export_service_pb2.StreamDownloadRequest(job_id=job_id)
    stream = channel.unary_stream(METHOD, type(request).SerializeToString, read_chunk)
    grpc.channel_ready_future(channel).result()

    def read() -> int:
        size = 0
        for chunk in stream(request):
            if crc32c(chunk.data) != chunk.crc32c:
                raise ValueError("a chunk is not what was sent")
            size += len(chunk.data)
        return size

    return read


def exportd_client(address: str, job_id: str, ranges: str) -> Callable[[], int]:
    """The Python client's verified download."""
    import exportd  # noqa: PLC0415

    client = exportd.Client(address)
    job = client.job(job_id)

    def read() -> int:
        with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
            done = job.download(Path(directory) / "file", parallel=int(ranges))
            assert done.verified_by == "sha256"
            return done.size

    return read


def flight_stream(address: str) -> Callable[[], int]:
    """Flight's do_get, batch by batch."""
    from pyarrow import flight  # noqa: PLC0415

    client = flight.connect(f"grpc://{address}")
    client.wait_for_available()

    def read() -> int:
        size = 0
        for chunk in client.do_get(flight.Ticket(b"file")):
            size += chunk.data.column(0)[0].as_buffer().size
        return size

    return read


def http_file(address: str) -> Callable[[], int]:
    """A GET, into one buffer again and again."""
    connection = http.client.HTTPConnection(address)
    connection.connect()
    room = memoryview(bytearray(_ROOM))

    def read() -> int:
        connection.request("GET", "/file")
        response = connection.getresponse()
        assert response.status == http.HTTPStatus.OK, response.status
        size = 0
        while count := response.readinto(room):
            size += count
        return size

    return read


_READERS: dict[str, Callable[..., Callable[[], int]]] = {
    "exportd": exportd_stream,
    "client": exportd_client,
    "flight": flight_stream,
    "http": http_file,
}


def main() -> None:
    """Read once; connecting is not measured."""
    kind, *arguments = sys.argv[1:]
    read = _READERS[kind](*arguments)
    cpu, started = time.process_time(), time.perf_counter()
    size = read()
    seconds = time.perf_counter() - started
    used = time.process_time() - cpu
    print(json.dumps({"size": size, "seconds": seconds, "cpu": used}))


if __name__ == "__main__":
    main()
