"""Where an encoder's bytes go: as they are, or through gzip or zstd.

A frame is a gzip member (RFC 1952) or a zstd frame (RFC 8878). Files of several frames
are valid, which is what lets a prefix be cut off and parts be joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa
from isal import isal_zlib

from exportd_server.encoders.base import Buffer, ByteSink, Compression

# Level 0 costs as much time and gives half the compression; 2 and 3 give no more.
_GZIP_LEVEL = 1
_GZIP_WRAPPER = 16 + 15
_SMALL = 64 << 10
# A flush costs a few bytes and some compression: not for less plain data than this.
_WORTH_FLUSHING = 256 << 10


class Output(Protocol):
    """Takes plain bytes and passes them on, compressed or not."""

    @property
    def written(self) -> int:
        """Bytes that the sink has taken."""
        ...

    def write(self, data: Buffer, /) -> None:
        """Take all of `data`; the first after a frame's end begins another."""
        ...

    def flush(self) -> None:
        """Push out what the compressor holds back, when it is worth the bytes that a cut
        in the stream costs."""
        ...

    def end_frame(self) -> None:
        """End the frame, if one was begun."""
        ...

    def close(self) -> None:
        """End the frame; with nothing written at all, write an empty one."""
        ...


def open_output(sink: ByteSink, compression: Compression) -> Output:
    """The output that compresses so."""
    return _OUTPUTS[compression](sink)


class _Plain:
    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink
        self.written = 0

    def write(self, data: Buffer, /) -> None:
        self._sink.write(data)
        self.written += len(data)

    def flush(self) -> None:
        pass

    def end_frame(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Gzip:
    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink
        self._frame: Any = None
        self._held = 0
        self.written = 0

    def write(self, data: Buffer, /) -> None:
        self._held += len(data)
        if self._frame is None:
            self._frame = isal_zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WRAPPER)
        self._push(self._frame.compress(data))

    def flush(self) -> None:
        if self._frame is not None and self._held >= _WORTH_FLUSHING:
            self._push(self._frame.flush(isal_zlib.Z_SYNC_FLUSH))
            self._held = 0

    def end_frame(self) -> None:
        if self._frame is not None:
            self._push(self._frame.flush())
            self._frame = None

    def close(self) -> None:
        if not self.written and self._frame is None:
            self.write(b"")
        self.end_frame()

    def _push(self, data: bytes) -> None:
        if data:
            self._sink.write(data)
            self.written += len(data)


class _Zstd:
    """Arrow's own zstd, at its level 1."""

    def __init__(self, sink: ByteSink) -> None:
        self._tap = Tap(sink)
        self._frame: Any = None
        self._held = 0

    @property
    def written(self) -> int:
        """Bytes that the sink has taken."""
        return self._tap.written

    def write(self, data: Buffer, /) -> None:
        self._held += len(data)
        with self._tap.open():
            if self._frame is None:
                self._frame = pa.CompressedOutputStream(self._tap.file(), "zstd")
            self._frame.write(data)

    def flush(self) -> None:
        if self._frame is not None and self._held >= _WORTH_FLUSHING:
            with self._tap.open():
                self._frame.flush()
            self._held = 0

    def end_frame(self) -> None:
        if self._frame is not None:
            with self._tap.open():
                self._frame.close()
            self._frame = None

    def close(self) -> None:
        if not self.written and self._frame is None:
            self.write(b"")
        self.end_frame()


_OUTPUTS: dict[Compression, Callable[[ByteSink], Output]] = {
    Compression.NONE: _Plain,
    Compression.GZIP: _Gzip,
    Compression.ZSTD: _Zstd,
}


class Tap:
    """The sink as a file for Arrow's writers.

    Small writes are gathered. Bytes flow only inside `open()`: Arrow's writers close
    themselves when they are thrown away, and what they write then must not reach a part
    that its owner has given up.
    """

    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink
        self._small = bytearray()
        self._flowing = False
        self._skipping = 0
        self.written = 0
        self.closed = False

    def file(self) -> Any:
        """A file of Arrow's that writes here."""
        return pa.PythonFile(self, mode="w")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let bytes flow; at the end all of them have reached the sink."""
        self._flowing = True
        try:
            yield
            self._drain()
        finally:
            self._flowing = False

    def write(self, data: Any, /) -> int:
        """Take all of `data`."""
        size = memoryview(data).nbytes
        view = memoryview(data)[self._skipping :]
        self._skipping = max(0, self._skipping - size)
        if self._flowing:
            if view.nbytes < _SMALL:
                self._small += view
                if len(self._small) >= _SMALL:
                    self._drain()
            else:
                self._drain()
                self._sink.write(view)
            self.written += view.nbytes
        return size

    def skip(self, size: int) -> None:
        """Leave out the next `size` bytes: they were written before."""
        self._skipping = size

    def tell(self) -> int:
        """Bytes taken so far."""
        return self.written

    def flush(self) -> None:
        """Nothing: `open` drains at its end."""

    def close(self) -> None:
        """Nothing: the sink belongs to somebody else."""

    def _drain(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            self._sink.write(small)
